"""The published networks: keys, shapes and what they compute.

`LOGITS` are the figures of the networks of megvii-research/mdistiller (commit a08d46f) in eval mode and float64, with
the weights that `filled` gives by each tensor's name and shape, on the images of `images`. Signatures and counts are
theirs too, at 100 classes.
"""

import hashlib
import zlib

import pytest
import torch
from torch import Tensor

from tune_topkd.models import build_model
from tune_topkd.models import count_parameters
from tune_topkd.models import find_head
from tune_topkd.models import model_names
from tune_topkd.models.cifar import CIFAR

LAYOUTS = {
    # parameters, tensors of the state dict, signature
    "resnet8": (83_892, 56, "490a91da87d4"),
    "resnet14": (181_108, 92, "b0d298fadc88"),
    "resnet20": (278_324, 128, "bb7c5044811d"),
    "resnet32": (472_756, 200, "afd551a2b59b"),
    "resnet44": (667_188, 272, "e68c4cfc5791"),
    "resnet56": (861_620, 344, "cde589176feb"),
    "resnet110": (1_736_564, 668, "2ebd5a9e7bc0"),
    "resnet8x4": (1_233_540, 62, "62372b8b5d82"),
    "resnet32x4": (7_433_860, 206, "6641faa540c0"),
    "wrn_16_1": (180_916, 82, "fc403167c5dc"),
    "wrn_16_2": (703_284, 83, "e9b59d2d812a"),
    "wrn_40_1": (569_780, 226, "52a2d23cc72d"),
    "wrn_40_2": (2_255_156, 227, "449072d1db8b"),
    "vgg8": (3_965_028, 37, "b6217281a136"),
    "vgg11": (9_277_284, 58, "b70b945f3689"),
    "vgg13": (9_462_180, 72, "43eaab75678c"),
    "vgg16": (14_774_436, 93, "36439a7802fc"),
    "vgg19": (20_086_692, 114, "07ba1c29a059"),
    "MobileNetV2": (812_836, 320, "41eb61a684f4"),
    "ShuffleV1": (949_258, 296, "ffba765e0eba"),
    "ShuffleV2": (1_355_528, 338, "6d5ff66406de"),
    "ResNet18": (11_220_132, 122, "fbab2ec2f408"),
    "ResNet50": (23_705_252, 320, "4b4e44c25f57"),
}

PLACES = ((0, 0), (1, 42), (1, 99))
LOGITS = {
    # at PLACES: image and class
    "resnet8": (0.889785794635, -0.290278972067, 0.924849790153),
    "resnet14": (1.37144622353, -0.141118325668, 0.110489756986),
    "resnet20": (1.35994637885, 1.48613850161, 0.133375959034),
    "resnet32": (0.569022594146, 6.93743948309, 0.707085282973),
    "resnet44": (-1.61311275757, 16.3123318592, -6.61953877686),
    "resnet56": (19.5137615779, 42.3301423154, -19.5318390272),
    "resnet110": (-14.9374309724, 627.534369777, -100.440404613),
    "resnet8x4": (-0.0628389531054, 0.500161995394, 0.756553704672),
    "resnet32x4": (3.33590523417, -3.6133246915, 2.55358319688),
    "wrn_16_1": (0.988924897362, -0.0228126708663, -1.47212278892),
    "wrn_16_2": (-0.806783814618, -1.18257366827, 1.2515204933),
    "wrn_40_1": (1.84314329766, 0.721787135365, -2.68885913128),
    "wrn_40_2": (1.07020587329, -1.48266887474, -0.199680807914),
    "vgg8": (-0.496686761709, 0.0677703251411, 0.26203110641),
    "vgg11": (-0.00150091420706, -0.0911652956763, 0.0517127409671),
    "vgg13": (-0.0155105720503, -0.127818154386, 0.0556404829821),
    "vgg16": (-0.216185478463, -0.293019496515, 0.394913383048),
    "vgg19": (-0.0474176236883, -0.147868796399, 0.0306724183419),
    "MobileNetV2": (-0.0940381683847, 0.205306570613, 0.199252309104),
    "ShuffleV1": (-2.96774631687, 0.563434503505, 0.465117156826),
    "ShuffleV2": (0.049042506574, -0.00741598650536, -0.210757018235),
    "ResNet18": (0.137344145813, 0.0245161017132, 0.395948116973),
    "ResNet50": (-0.611009913764, 0.253518466972, 0.741775920251),
    "mobilenet_v1": (-0.100171934095, -0.135883495578, 0.339503651311),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Depthwise convolutions in float64 are many short jobs, for which threads wait on one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spread(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1), scattered by integer arithmetic alone and so equal on every machine; float64."""
    x = torch.arange(torch.Size(shape).numel()) + zlib.crc32(name.encode())
    for factor in (0x45D9F3B, 0x119DE1F3, 0x3C6EF35):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)).double() / 2**31 - 1).reshape(shape)


def filled(name: str, shape: torch.Size) -> Tensor:
    """Weights for the tensor of a state dict, such that activations neither vanish nor grow much with depth."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    values = spread(name, shape)
    if len(shape) > 1:
        return values * (3 / shape[1:].numel()) ** 0.5
    offset = 0.0 if name.endswith(("bias", "running_mean")) else 1.0
    return offset + 0.25 * values


def fill(network: torch.nn.Module) -> torch.nn.Module:
    network.load_state_dict({name: filled(name, value.shape) for name, value in network.state_dict().items()})
    return network.double().eval()


def images(side: int) -> Tensor:
    return 2 * spread("images", (2, 3, side, side))


def signature(state: dict[str, Tensor]) -> str:
    shapes = "".join(f"{name}:{tuple(state[name].shape)};" for name in sorted(state))
    return hashlib.sha256(shapes.encode()).hexdigest()[:12]


def test_the_zoo_is_known_with_and_without_its_prefix():
    assert len(LAYOUTS) == 23
    assert set(LAYOUTS) == set(CIFAR) <= set(model_names())
    with torch.device("meta"):
        for name in ("resnet56", "wrn_40_2"):
            assert type(build_model(f"cifar:{name}", num_classes=3)) is type(build_model(name, num_classes=3))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_that_of_the_published_checkpoints(name):
    with torch.device("meta"):
        network = build_model(name, num_classes=100)
    state = network.state_dict()
    assert (count_parameters(network), len(state), signature(state)) == LAYOUTS[name]
    assert find_head(network)[1].out_features == 100


def test_mobilenet_v1_has_the_layout_of_the_field():
    with torch.device("meta"):
        network = build_model("mobilenet_v1", num_classes=1000)
    assert count_parameters(network) == 4_231_976
    blocks = {int(name.split(".")[1]) for name in network.state_dict() if name.startswith("model.")}
    assert blocks == set(range(14))
    assert signature(network.state_dict()) == "f6f84f868191"


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_those_of_the_published_networks(name):
    large = name == "mobilenet_v1"
    network = fill(build_model(name, num_classes=1000 if large else 100))
    with torch.no_grad():
        logits = network(images(224 if large else 32))
    assert [logits[place].item() for place in PLACES] == pytest.approx(LOGITS[name], rel=1e-9, abs=0)


@pytest.mark.parametrize(
    "name", ["resnet8", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "mobilenet_v1"]
)
def test_every_weight_gets_a_gradient_and_larger_images_work(name):
    network = build_model(name, num_classes=5)
    logits = network(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- DeiT-Ti --------------------------------------------------------------------------------------------------------

TIMM_NAMES = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj": "patch_embed.proj",
    "encoder.layers.encoder_layer_": "blocks.",
    "ln_": "norm",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    "encoder.ln": "norm",
    "heads.head": "head",
}


def test_deit_tiny_is_timms_under_torchvisions_names():
    pytest.importorskip("timm")
    ours = build_model("deit_tiny", num_classes=7, image_size=64).eval()
    theirs = build_model("timm:deit_tiny_patch16_224", num_classes=7, img_size=64).eval()
    state = {}
    for name, value in ours.state_dict().items():
        for own, timms in TIMM_NAMES.items():
            name = name.replace(own, timms)
        state[name] = value
    theirs.load_state_dict(state)
    batch = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(batch), rtol=0, atol=1e-5)


def test_deit_tiny_has_the_published_size_and_starts_like_deit():
    with torch.device("meta"):
        assert count_parameters(build_model("deit_tiny", num_classes=100)) == 5_543_716
    state = build_model("deit_tiny", num_classes=100).state_dict()
    drawn = [
        n for n in state if n.endswith(("head.weight", "mlp.0.weight", "in_proj_weight", "out_proj.weight", "ding"))
    ]
    assert len(drawn) == 1 + 3 * 12 + 1
    assert all(state[name].std().item() == pytest.approx(0.02, rel=0.05) for name in drawn)
    assert all(not value.any() for name, value in state.items() if "ln" not in name and name.endswith("_proj.bias"))


def test_drop_path_leaves_branches_out_in_training_only_and_keeps_the_keys():
    whole = build_model("deit_tiny", num_classes=3, image_size=32)
    network = build_model("deit_tiny", num_classes=3, image_size=32, drop_path=0.5)
    network.load_state_dict(whole.state_dict())
    batch = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(whole.train()(batch), whole.eval()(batch))
        assert torch.equal(network.eval()(batch), whole(batch))
        torch.manual_seed(0)
        assert not torch.allclose(network.train()(batch), whole(batch))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"image_size": 30}, "patch_size must divide image_size = 30, but got 16"),
        ({"image_size": 0}, "image_size must be a positive integer, but got 0"),
        ({"patch_size": 16.0}, r"patch_size must be a positive integer, but got 16\.0"),
        ({"drop_path": 1}, r"drop_path must be a number in \[0, 1\), but got 1"),
        ({"drop_path": True}, "drop_path must be a number"),
    ],
)
def test_deit_tiny_refuses_what_does_not_fit(kwargs, said):
    with pytest.raises(ValueError, match=said):
        build_model("deit_tiny", num_classes=3, **kwargs)


def test_wide_resnets_drop_between_the_convolutions_of_a_block():
    network = build_model("wrn_16_1", num_classes=3, dropout=0.5)
    batch = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(network(batch), network(batch))
        assert torch.equal(network.eval()(batch), network(batch))
    for wrong in (-0.1, 1, True, "half"):
        with pytest.raises(ValueError, match=r"dropout must be a number in \[0, 1\)"):
            build_model("wrn_16_1", num_classes=3, dropout=wrong)
