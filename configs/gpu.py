# One GPU of 80 GB (or less): everything V3 has, at a size that shows its curves in minutes.
#
#   parameters     0.14B in all, 36M work on a token, + 14M of the MTP module's own
#   tokens         1000 steps * 64 sequences * 1024 tokens = 66M: many epochs of the standard library; with a network,
#                  --data=fineweb, or --data=FOLDER for text of your own

vocab_size = 8192
dim = 512
n_layers = 10
n_dense_layers = 1
inter_dim = 1408
moe_inter_dim = 256
n_heads = 8
q_lora_rank = 256
kv_lora_rank = 128
qk_nope_head_dim = 64
qk_rope_head_dim = 32
v_head_dim = 64
n_routed_experts = 32
n_activated_experts = 4
n_expert_groups = 1
n_limited_groups = 1
n_mtp = 1

seq_len = 1024
batch_size = 64
micro_batch_size = 32
precision = "bf16"

max_steps = 1000
warmup_steps = 100
decay_start = 400
lr = 2e-3
min_lr = 1e-4
eval_interval = 200
save_interval = 500
