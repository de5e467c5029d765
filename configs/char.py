# Bytes of any English text of about a megabyte: python train.py configs/char.py --data=FILE
# The size and the schedule are for two CPU cores and half a minute, to be measured against nanoGPT's recipe for a
# laptop (python bench.py char); the last tenth of the file is held out.
#
#   parameters     0.28M in all, 0.17M work on a token, + 0.11M of the MTP module's own
#   tokens         480 steps * 16 sequences * 128 bytes = 1.0M: one pass over a megabyte

tokenizer = "bytes"
vocab_size = 260                    # 256 bytes and 4 special tokens
data = "shakespeare"
fim_rate = 0.0                      # one document: nothing to rearrange

dim = 64
n_layers = 3
n_dense_layers = 1
inter_dim = 192
moe_inter_dim = 48
n_heads = 2
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 32
n_routed_experts = 8
n_activated_experts = 2
init_std = 0.08

seq_len = 128
batch_size = 16
micro_batch_size = 16
max_steps = 480
warmup_steps = 20
decay_start = 140
lr = 6e-3
min_lr = 3e-4
eval_interval = 0
save_interval = 0
