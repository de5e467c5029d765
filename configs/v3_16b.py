# A mixture for one node: the shape of DeepSeek-V2-Lite with V3's gate. One process holds it only with 261 GB; look at
# it with --plan.
#
#   parameters     15.7B in all, 2.66B work on a token, + 0.59B of the MTP module's own
#   latent cache   (512 + 64) * 27 layers * 2 bytes = 31,104 bytes per token

vocab_size = 102400
dim = 2048
n_layers = 27
n_dense_layers = 1
inter_dim = 10944
moe_inter_dim = 1408
n_heads = 16
q_lora_rank = 0                     # queries come straight from x
kv_lora_rank = 512
qk_nope_head_dim = 128
qk_rope_head_dim = 64
v_head_dim = 128
n_routed_experts = 64
n_shared_experts = 2
n_activated_experts = 6
n_expert_groups = 1                 # one node: no routing limits
n_limited_groups = 1
route_scale = 2.446
n_mtp = 1
init_std = 0.006

tokenizer = "cl100k_base"
seq_len = 4096
batch_size = 1024
micro_batch_size = 1
precision = "bf16"
recompute = True

max_steps = 100_000                 # 419B tokens
warmup_steps = 2000
decay_start = 70_000
decay_end = 97_000
lr = 4.2e-4
min_lr = 4.2e-5
final_lr = 1.4e-5
eval_interval = 1000
save_interval = 1000
