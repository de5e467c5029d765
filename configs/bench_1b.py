# The shape that speed is measured on: 1.30B parameters, V3's proportions at a size that trains on one 80 GB GPU.
# Its learning schedule is nominal: a few steps of it show the speed (with --vocab_size=8192 on the default corpus,
# whose text is too short for 50,304 tokens).
#
#   parameters     1.30B in all, 0.30B work on a token (0.20B without embedding and head)
#   latent cache   (256 + 64) * 12 layers * 2 bytes = 7,680 bytes per token

vocab_size = 50304
dim = 1024
n_layers = 12
n_dense_layers = 1
inter_dim = 2816
moe_inter_dim = 512
n_heads = 16
q_lora_rank = 512
kv_lora_rank = 256
qk_nope_head_dim = 128
qk_rope_head_dim = 64
v_head_dim = 128
n_routed_experts = 64
n_activated_experts = 6
n_expert_groups = 1
n_limited_groups = 1
n_mtp = 0

seq_len = 2048
batch_size = 16
micro_batch_size = 16
precision = "bf16"
max_steps = 1000
lr = 3e-4
min_lr = 3e-5
final_lr = 3e-5
