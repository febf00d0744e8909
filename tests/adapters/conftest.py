"""Four architectures, as small as they go, and the adapters that every one of them must carry."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig

from hf_lowrank.adapters import CoLAConfig, SLTrainConfig, SSTConfig, StructuredConfig

VOCABULARY = 48
ARCHITECTURES = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    ),
    "mixtral": lambda: MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=32,
    ),
}
REPLACING = {
    "cola": lambda **options: CoLAConfig(r=4, **options),
    "low_rank": lambda **options: CoLAConfig(r=4, bottleneck_act="linear", **options),
    "sltrain": lambda **options: SLTrainConfig(r=4, sparsity=0.1, **options),
    "structured": lambda **options: StructuredConfig(r=4, blocks=2, **options),
    "sst": lambda **options: SSTConfig(r=4, **options),
}


@pytest.fixture(params=sorted(ARCHITECTURES))
def base_config(request):
    return ARCHITECTURES[request.param]()


@pytest.fixture
def architectures():
    """Makes each architecture's config by name."""
    return ARCHITECTURES


@pytest.fixture
def llama_config():
    return ARCHITECTURES["llama"]()


@pytest.fixture(params=sorted(REPLACING))
def replacing(request):
    """Makes the PEFT config of one replacing method; `.name` says which."""

    def make(**options):
        return REPLACING[request.param](**options)

    make.name = request.param
    return make


@pytest.fixture
def dense():
    """Builds the dense model of a config, always with the same weights, in eval mode."""

    def build(config, dtype=torch.float32):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return build


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stir():
    """Moves every trainable parameter away from its start, so that zero factors hide nothing."""

    def move(model):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    return move
