# DeepSeek-V3 itself: the numbers of the report's section 4.2, architecture and schedule.
# For reading and for arithmetic: python train.py configs/v3_671b.py --plan runs on a laptop.
#
#   parameters     671.026B in all, 37.55B work on a token (36.63B without the embedding, which is only looked up)
#                  + 11.61B of the MTP module's own
#   latent cache   (512 + 64) * 61 layers * 2 bytes = 70,272 bytes per token

vocab_size = 129280
dim = 7168
n_layers = 61
n_dense_layers = 3
inter_dim = 18432
moe_inter_dim = 2048
n_heads = 128
q_lora_rank = 1536
kv_lora_rank = 512
qk_nope_head_dim = 128
qk_rope_head_dim = 64
v_head_dim = 128
n_routed_experts = 256
n_shared_experts = 1
n_activated_experts = 8
n_expert_groups = 8                 # one per node; a token visits at most 4 nodes
n_limited_groups = 4
route_scale = 2.5
n_mtp = 1
init_std = 0.006

tokenizer = "tokenizer.json"        # the released one, of 128K tokens
seq_len = 4096
batch_size = 15360
batch_multiple = 128                # a ramp in steps that 128 pipelines can share out
micro_batch_size = 1
precision = "fp8"                   # products (section 3.3)
moments = "bf16"
recompute_mla = True
ema_decay = 0.999

# The ranks (section 3.2): 2048 GPUs, 128 pipelines of 16, experts over 64 GPUs on 8 nodes.
pp = 16
ep = 64
world = 2048
pipeline = "dualpipev"              # V3: DualPipe, which holds each stage twice: 91 GB a GPU, since ours hold FP32
                                    # weights whole, where V3's share out these masters too; this takes 74

# Tokens become steps. While the batch grows from 3072 to 15360 sequences, a step holds 9216 * 4096 = 37.7M tokens on
# average; afterwards 15360 * 4096 = 62.9M.
batch_ramp = 469_000_000_000 // (9216 * 4096)                                       # 12,424 steps for 469B tokens
decay_start = batch_ramp + (10_000 - 469) * 10**9 // (15360 * 4096)                 # constant until 10T tokens
decay_end = decay_start + 4_300 * 10**9 // (15360 * 4096)                           # cosine over 4.3T
max_steps = decay_end + 500 * 10**9 // (15360 * 4096)                               # 333B at min_lr, 167B at final_lr
warmup_steps = 2000
lr = 2.2e-4
min_lr = 2.2e-5
final_lr = 7.3e-6
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

mtp_weight = 0.3                    # for the first 10T tokens, then 0.1
bias_update_speed = 0.001           # 0 for the last 500B tokens
balance_alpha = 1e-4
fim_rate = 0.1
eval_interval = 1000
save_interval = 1000
