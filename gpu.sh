# limit: 70
export PYTHONPATH=.
timeout 40 python3 gpu_ep.py 2>&1 | grep -v Warning
timeout 28 python3 -m pytest -q -m gpu tests/test_expert_parallel.py 2>&1 | tail -25
