# limit: 45
export PYTHONPATH=.
timeout 40 python3 gpu_ep.py 2>&1 | grep -v Warning
