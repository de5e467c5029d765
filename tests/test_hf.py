"""The same model as transformers' DeepseekV3ForCausalLM: logits and gradients, through folders written by either
side."""
import pytest
import torch
import torch.nn.functional as F
from conftest import YARN, agree, lively, random_tokens, tiny

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-extra.txt")

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel  # noqa: E402

from configs import UserError  # noqa: E402
from model import HF_FIELDS, V3, config_from_hf, hf_config, official_tensors, save_hf  # noqa: E402

pytestmark = pytest.mark.extra
transformers.logging.set_verbosity_error()

VARIANTS = {
    "q direct, odd head dims": dict(),
    "q latent": dict(q_lora_rank=14),
    "4 groups": dict(n_routed_experts=16, n_activated_experts=4, n_expert_groups=4, n_limited_groups=2),
    "4 groups, biases around -0.6": dict(n_routed_experts=16, n_activated_experts=4, n_expert_groups=4,
                                         n_limited_groups=2,
                                         bias=-0.6),
    "YaRN": dict(q_lora_rank=14, rope_factor=4.0, **YARN),
    "YaRN, other mscales and betas": dict(rope_factor=40.0, mscale=0.7, mscale_all_dim=0.3, beta_fast=8.0, **YARN),
    "two dense layers, two shared experts": dict(n_dense_layers=2, n_shared_experts=2),
    "all dense": dict(n_dense_layers=3),
    "head dims of powers of two": dict(qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, rope_theta=5e5),
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def split(changes):
    return {**{k: v for k, v in changes.items() if k != "bias"}, "n_mtp": 0}, changes.get("bias", 0.0)


def official_gradients(theirs):
    """transformers stacks the experts; {official name: gradient}."""
    out = {}
    for name, p in theirs.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(p.grad):
                for piece, half in zip(("gate_proj", "up_proj"), both.chunk(2)):
                    out[name.replace("gate_up_proj", f"{e}.{piece}.weight")] = half
        elif name.endswith("experts.down_proj"):
            out.update({name.replace("down_proj", f"{e}.down_proj.weight"): g for e, g in enumerate(p.grad)})
        else:
            out[name] = p.grad
    return out


def same_model(ours, theirs):
    """Logits to 1e-5, and the gradient of every parameter of the mean cross-entropy."""
    tokens = random_tokens(2, min(40, ours.config.context) + 1)               # with YaRN: 2.5 times the original length
    theirs.eval()
    logits = theirs(tokens[:, :-1]).logits
    agree(ours(tokens[:, :-1]), logits, 1e-5, "logits")
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    ours.zero_grad()
    loss, parts = ours.loss(tokens)
    assert parts["mtp_loss"] == 0
    loss.backward()
    agree(parts["loss"], expected, 1e-5, "loss")
    grads = official_tensors(ours, {name: p.grad for name, p in ours.named_parameters()})
    their_grads = official_gradients(theirs)
    assert grads.keys() == their_grads.keys()
    for name, gradient in their_grads.items():
        agree(grads[name], gradient, 2e-5, f"gradient of {name}", least=1e-4)


@variants
def test_a_folder_of_theirs_becomes_the_same_model(tmp_path, changes):
    changes, bias = split(changes)
    c = tiny(**changes, balance_alpha=0.0)
    theirs = lively(DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(c))))
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(bias + 0.1 * torch.randn(buffer.shape))
        for name, p in theirs.named_parameters():
            if name.endswith("layernorm.weight"):
                p.copy_(0.5 + torch.rand(p.shape))
    theirs.save_pretrained(tmp_path / "hf")
    ours = V3.from_hf(tmp_path / "hf", balance_alpha=0.0)
    same_model(ours, theirs)


@variants
def test_a_folder_of_ours_becomes_the_same_model_of_theirs(tmp_path, changes):
    changes, bias = split(changes)
    ours = lively(V3(tiny(**changes, balance_alpha=0.0)), bias)
    save_hf(ours, tmp_path / "hf")
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    same_model(ours, theirs)


# --- multi-token prediction -------------------------------------------------------------------------------------------

@pytest.fixture(params=[1, 2], ids=["one depth", "two depths"])
def pair(request, tmp_path, monkeypatch):
    """(ours, theirs) from one folder of ours with an MTP module; transformers knows the module's layer number by a
    pattern written for 61 layers."""
    n_mtp = request.param
    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected",
                        [rf"model\.layers\.{3 + k}.*" for k in range(n_mtp)])
    ours = lively(V3(tiny(q_lora_rank=14, n_mtp=n_mtp, init_std=0.3))).eval()
    save_hf(ours, tmp_path / "hf")
    return ours, DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hf").eval()


@torch.no_grad()
def test_mtp_drafts_are_those_of_transformers_mtp_model(pair):
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel
    ours, theirs = pair
    mtp, n_mtp, T = MtpModel.from_pretrained(theirs), ours.config.n_mtp, 12
    tokens = random_tokens(2, T + n_mtp)
    h, state = ours.hidden(tokens[:, :T])[0], theirs.model(tokens[:, :T]).last_hidden_state
    cache = MtpCache(config=theirs.config.get_mtp_config())
    drafts = ours.draft(h, tokens)
    assert len(drafts) == n_mtp
    for k, (our_state, _) in enumerate(drafts):
        # their positions are those of the token looked ahead to; only distances matter
        positions = torch.arange(k + 1, T + k + 1)[None]
        state = mtp.forward_layer(k, state, positions, cache, input_ids=tokens[:, k + 1:T + k + 1])
        agree(ours.logits(our_state), theirs.lm_head(state), 1e-5, f"draft logits of depth {k + 1}")


@torch.no_grad()
def test_their_drafting_generation_runs_on_our_folder_and_writes_what_greedy_decoding_writes(pair):
    ours, theirs = pair
    prompt, new = random_tokens(1, 7), 12
    greedy = dict(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0,
                  attention_mask=torch.ones_like(prompt))
    plain = theirs.generate(prompt, **greedy)
    drafted = theirs.generate(prompt, use_mtp=True, **greedy)
    assert plain.shape == (1, 7 + new) and torch.equal(drafted, plain)
    expected = prompt
    for _ in range(new):                                                      # and so does our own model
        expected = torch.cat([expected, ours(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(plain, expected) and len(set(plain[0, 7:].tolist())) > 4


def test_a_folder_of_theirs_that_promises_mtp_and_holds_none_is_read_with_n_mtp_0(tmp_path):
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(tiny(n_mtp=1))))    # their save never writes the module
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="model.layers.3.*is missing"):
        V3.from_hf(tmp_path / "hf")
    same_model(V3.from_hf(tmp_path / "hf", n_mtp=0, balance_alpha=0.0), theirs)


def test_config_json_survives_a_round_trip_through_transformers(tmp_path):
    c = tiny(q_lora_rank=14, rope_factor=4.0, **YARN)
    DeepseekV3Config(**hf_config(c)).save_pretrained(tmp_path)
    back = config_from_hf(tmp_path)
    rope = {"rope_theta", "rope_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_seq_len"}
    for key in HF_FIELDS.keys() | rope | {"max_seq_len"}:
        assert getattr(back, key) == getattr(c, key), key
