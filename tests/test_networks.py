"""The transformer's shapes, sizes, options and symmetries."""

import pytest
import torch

from jlt.config import NetworkConfig
from jlt.errors import JLTError
from jlt.experiments.recipes import preset
from jlt.networks.layers import RotaryPositions
from jlt.networks.sizes import SIZES
from jlt.networks.transformer import Transformer, build_network, count_parameters
from jlt.patches import patchify, unpatchify

TINY = {"channels": 6, "height": 4, "width": 8, "num_classes": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}
OPTIONS = [
    {},
    {"patch_size": 2},
    {"patch_size": 4},
    {"bottleneck_size": 5},
    {"fixed_positions": True},
    {"learned_positions": True},
    {"context_tokens": 3, "context_start": 1},
    {"context_tokens": 2, "context_start": 0, "bottleneck_size": 4, "fixed_positions": True, "patch_size": 2},
]


def woken(network):
    """Give the zero-initialised parts random weights, so that every path shows in the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, 4, 8, generator=generator), torch.rand(n, generator=generator), torch.arange(n)


@pytest.mark.parametrize("options", OPTIONS)
def test_output_has_the_latents_shape_and_every_weight_matters(options):
    network = woken(Transformer(NetworkConfig(**TINY, **options)))
    z, t, labels = inputs()
    output = network(z, t, labels)
    assert output.shape == z.shape
    output.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", OPTIONS)
def test_samples_do_not_see_each_other(options):
    network = woken(Transformer(NetworkConfig(**TINY, **options))).eval()
    z, t, labels = inputs()
    together = network(z, t, labels)
    for i in range(3):
        torch.testing.assert_close(network(z[i : i + 1], t[i : i + 1], labels[i : i + 1])[0], together[i])


def test_first_output_is_zero():
    assert Transformer(NetworkConfig(**TINY))(*inputs()).abs().max() == 0


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpoint_blocks in (False, True):
        network = woken(build_network(NetworkConfig(**TINY), seed=0))
        network.checkpoint_blocks = checkpoint_blocks
        network(*inputs()).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_initial_weights_are_a_function_of_the_seed():
    a, b, c = (build_network(NetworkConfig(**TINY), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["blocks.0.attention.qkv.weight"], c["blocks.0.attention.qkv.weight"])


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_network(NetworkConfig(**TINY), seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_are_cut_row_by_row_with_the_channel_first(patch_size):
    p, z = patch_size, torch.arange(2 * 3 * 4 * 8.0).reshape(2, 3, 4, 8)
    patches = patchify(z, p)
    columns = 8 // p
    for n in range(patches.shape[1]):
        row, column = n // columns * p, n % columns * p
        assert torch.equal(patches[:, n], z[:, :, row : row + p, column : column + p].flatten(1))
    assert torch.equal(unpatchify(patches, p, 4, 8), z)


def test_rotary_products_depend_on_the_offset_alone():
    positions = RotaryPositions(head_size=16, height=6, width=6)
    query, key = torch.randn(2, 1, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    turned_query, turned_key = (
        positions(value.expand(1, 36, 1, 1, 16), torch.ones(1, 16))[0, :, 0, 0] for value in (query, key)
    )
    products = (turned_query @ turned_key.T).reshape(6, 6, 6, 6)
    for row, column in [(0, 1), (1, 0), (2, 3)]:
        here = products[0, 0, row, column]
        torch.testing.assert_close(products[2, 1, 2 + row, 1 + column], here)
        torch.testing.assert_close(products[3, 2, 3 + row, 2 + column], here)
    assert (products[0, 0, 0, 1] - products[0, 0, 1, 0]).abs() > 1e-3


def test_named_sizes():
    _, base = preset("JLT-B/1")
    with torch.device("meta"):
        parameters = count_parameters(Transformer(base))
    assert 129.5e6 < parameters < 131e6
    assert (base.hidden_size, base.depth, base.num_heads, base.mlp_hidden_size) == (768, 12, 12, 2048)
    for name, (width, depth, heads) in {"L": (1024, 24, 16), "H": (1280, 32, 16)}.items():
        config = preset(f"JLT-{name}/2")[1]
        assert (config.hidden_size, config.depth, config.num_heads, config.patch_size) == (width, depth, heads, 2)
    for size in SIZES:
        for patch in (1, 2, 4):
            jlt, dit = preset(f"JLT-{size}/{patch}"), preset(f"DiT-{size}/{patch}")
            assert (jlt[0], dit[0]) == ("x", "v")
            assert jlt[1] == dit[1]


def test_unknown_preset_gets_the_nearest_name():
    with pytest.raises(JLTError, match="JLT-B/1"):
        preset("JLT-B1")


@pytest.mark.parametrize("wrong", [{"patch_size": 3}, {"num_heads": 5}, {"context_tokens": 1, "context_start": 3}])
def test_impossible_networks_are_refused(wrong):
    with pytest.raises(JLTError):
        NetworkConfig(**{**TINY, **wrong})
