# draft
vocab_size = 4096
dim = 192
n_layers = 4
n_dense_layers = 1
inter_dim = 512
moe_inter_dim = 128
n_heads = 4
kv_lora_rank = 64
qk_nope_head_dim = 32
qk_rope_head_dim = 16
v_head_dim = 48
n_routed_experts = 16
n_activated_experts = 4
seq_len = 256
batch_size = 16
micro_batch_size = 16
max_steps = 1000
