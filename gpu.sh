# limit: 60
nvidia-smi --query-gpu=memory.used,memory.total --format=csv,noheader
timeout 55 python3 bench.py overlap
cp results/overlap.json "$OUT"/
