# The default job: a V3 that learns Python from this Python's own standard library, on a laptop's CPU, in five minutes.
# Everything of V3 is on: latent attention, 8 routed experts and a shared one with bias balancing, multi-token
# prediction.
#
#   parameters     1.28M in all, 1.06M work on a token (0.79M of them embedding and head), + 0.21M of the MTP module
#   tokens         950 steps * 32 sequences * 128 tokens = 3.9M: 1.6 epochs of 2.4M
#   latent cache   (32 + 16) * 3 layers * 2 bytes = 288 bytes per token
#
# Two thirds of the arithmetic is the head's, once for the next token and once for the one after (MTP): with a few
# minutes of CPU, a narrow model that sees more text learns more than a wide one, and the head's products are worth BF16
# where the CPU has it.

vocab_size = 4096
dim = 96
n_layers = 3
n_dense_layers = 1
inter_dim = 256
moe_inter_dim = 64
n_heads = 3
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 32                     # equal to nope + rope: torch's fast CPU attention wants one head dim for q, k and v
n_routed_experts = 8
n_activated_experts = 2
init_std = 0.04

seq_len = 128
batch_size = 32
micro_batch_size = 32
max_steps = 950
warmup_steps = 30
decay_start = 285
lr = 7e-3
min_lr = 5e-4
eval_interval = 0
eval_stride = 64                    # every token is scored with at least half a window of context
save_interval = 250
bf16_head = True
