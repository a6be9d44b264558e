import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from tune_topkd.config import ModelConfig
from tune_topkd.models import ModelNameError
from tune_topkd.models import build_configured
from tune_topkd.models import build_model
from tune_topkd.models import check_model
from tune_topkd.models import count_parameters
from tune_topkd.models import find_head
from tune_topkd.models import model_names

DIGITS = ("digits_cnn", "digits_cnn_tiny", "digits_linear")


@pytest.mark.parametrize("name", DIGITS)
def test_every_digits_model_gives_logits_of_digits_and_a_gradient_for_each_weight(name):
    model = build_model(name, num_classes=7)
    logits = model(torch.rand(5, 1, 8, 8))
    assert logits.shape == (5, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_students_are_much_smaller_than_the_teacher():
    teacher, tiny, linear = (count_parameters(build_model(name, num_classes=10)) for name in DIGITS)
    assert linear == 64 * 10 + 10
    assert tiny * 20 < teacher
    assert linear * 20 < teacher


def test_count_parameters_leaves_out_running_statistics():
    # One 3×3 convolution without bias to 2 channels, its batch norm's scale and shift, and the linear map to 10.
    assert count_parameters(build_model("digits_cnn", num_classes=10, widths=[2])) == 18 + 4 + 30


def test_kwargs_reach_the_network():
    wide = build_configured(ModelConfig(name="digits_cnn", kwargs={"widths": [3, 5, 9]}), num_classes=4)
    assert wide.classifier.in_features == 9
    assert wide.classifier.out_features == 4


UNKNOWN = {
    "digits_cn": r"unknown model 'digits_cn'; did you mean 'digits_cnn'.*known: .*digits_linear.*; or cifar:NAME, ",
    "cifar:resnet57": r"unknown model 'cifar:resnet57'; did you mean 'resnet56'.*known: ((?!digits).)*$",
    "cifar:digits_cnn": "unknown model 'cifar:digits_cnn'",
    "torchvision:resnt18": (
        r"unknown model 'torchvision:resnt18'; did you mean 'resnet18' .* and \d+ more: torchvision\.models\.list_models"
    ),
    "torchvision:fcn_resnet50": "unknown model 'torchvision:fcn_resnet50'; did you mean 'resnet50'",
    "torchvision:§": r"unknown model 'torchvision:§'; known: alexnet, .* and \d+ more",
    "torchvision:": "unknown model 'torchvision:'; known: alexnet",
    "torchvison:resnet18": "unknown model .*No module named 'torchvison'; did you mean 'torchvision'",
    "no_such_module:make": "unknown model 'no_such_module:make': cannot be imported: ModuleNotFoundError: No module",
    "json:make": "unknown model 'json:make': cannot be imported: AttributeError: .*no attribute 'make'$",
    "json:__name__": "unknown model 'json:__name__': must be callable, but is a str",
    "collections:OrderedDict": r"must give a torch\.nn\.Module, but gave a OrderedDict",
    "a b:c": "unknown model 'a b:c': cannot be imported: invalid format",
    ":": "unknown model ':': cannot be imported",
    "": "unknown model ''; known: ",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_name_tells_the_near_and_the_known_ones(name):
    with pytest.raises(ModelNameError, match=UNKNOWN[name]) as caught:
        build_model(name, num_classes=10)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    with pytest.raises(ModelNameError, match=UNKNOWN[name]):
        check_model(ModelConfig(name=name), num_classes=10)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("digits_cnn", {"width": 3}, "model 'digits_cnn': .*'width'; known kwargs: widths"),
        ("digits_linear", {"widths": [3]}, "model 'digits_linear': .*'widths'; known kwargs: none"),
        ("digits_cnn", {"widths": []}, r"widths must be .* but got \[\]"),
        ("digits_cnn", {"widths": 8}, "widths must be .* but got 8"),
        ("digits_cnn_tiny", {"widths": [4, 0]}, r"widths must be .* but got \[4, 0\]"),
        ("digits_cnn_tiny", {"widths": [True]}, "widths must be"),
        ("digits_cnn_tiny", {"num_classes": 3}, "must not set num_classes"),
        ("digits_cnn_tiny", {"name": 3}, "known kwargs: widths"),
        ("resnet8", {"depth": 14}, "model 'resnet8': .*'depth'; known kwargs: none"),
        ("cifar:wrn_16_1", {"drop": 0.3}, "model 'cifar:wrn_16_1': .*'drop'; known kwargs: dropout"),
        ("torchvision:resnet18", {"depth": 14}, "model 'torchvision:resnet18': TypeError: .*'depth'"),
        ("torchvision:resnet18", {"name": 3}, "model 'torchvision:resnet18': TypeError: .*'name'"),
        ("torchvision:resnet18", {"num_classes": 3}, "must not set num_classes"),
        (
            "torchvision:resnet18",
            {"weights": "DEFAULT"},
            "'torchvision:resnet18': kwargs must not set weights: .*file$",
        ),
        ("torchvision:resnet18", {"pretrained": True}, "kwargs must not set pretrained: .* weights come from a check"),
    ],
)
def test_kwargs_that_do_not_fit_are_value_errors(name, kwargs, said):
    config = ModelConfig(name=name, kwargs=kwargs)
    for build in (build_configured, check_model):
        with pytest.raises(ValueError, match=said) as caught:
            build(config, num_classes=10)
        assert not isinstance(caught.value, ModelNameError)


@pytest.mark.parametrize("name", [*model_names(), "torchvision:resnet18", "torchvision:regnet_y_400mf"])
def test_what_can_be_built_passes_the_check(name):
    check_model(ModelConfig(name=name), num_classes=10)


def test_our_own_networks_are_checked_without_their_weights(monkeypatch):
    devices = []
    register = nn.Module.register_parameter

    def recorded(self, name, parameter):
        devices.append(parameter.device.type if parameter is not None else "none")
        register(self, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", recorded)
    check_model(ModelConfig(name="ResNet50"), num_classes=10)
    assert set(devices) <= {"meta", "none"}


# --- the libraries' networks ----------------------------------------------------------------------------------------


def test_torchvision_networks_have_the_classes_and_the_kwargs():
    network = build_model("torchvision:resnet18", num_classes=7, width_per_group=64)
    assert count_parameters(network) == 11_689_512 - 993 * 513
    assert network.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 7)


def test_torchvision_networks_with_auxiliary_heads_give_logits_in_training_unless_asked():
    network = build_model("torchvision:googlenet", num_classes=7)
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    with_heads = build_model("torchvision:googlenet", num_classes=7, aux_logits=True)
    assert len(with_heads(torch.rand(2, 3, 64, 64))) == 3


def test_timm_networks_have_the_published_sizes():
    pytest.importorskip("timm")
    with torch.device("meta"):
        for name, parameters in (("deit_tiny_patch16_224", 5_543_716), ("pit_ti_224", 4_615_972)):
            assert count_parameters(build_model(f"timm:{name}", num_classes=100)) == parameters
    network = build_configured(
        ModelConfig(name="timm:deit_tiny_patch16_224", kwargs={"img_size": 32, "drop_path_rate": 0.1}), num_classes=3
    )
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        (
            "timm:deit_tiny_patch16_22",
            {},
            r"did you mean 'deit_tiny_patch16_224' .* and \d{3,} more: timm\.list_models",
        ),
        ("timm:resnet50.a1_in1k", {}, r"unknown model 'timm:resnet50\.a1_in1k'; did you mean 'resnet50' "),
        ("timm:hf-hub:timm/resnet50", {}, "unknown model 'timm:hf-hub:timm/resnet50'"),
        ("timm:resnet18", {"depth": 3}, "model 'timm:resnet18': TypeError: .*'depth'"),
        ("timm:resnet18", {"pretrained": True}, "kwargs must not set pretrained: .* checkpoint file"),
        ("timm:resnet18", {"checkpoint_path": "x"}, "kwargs must not set checkpoint_path"),
    ],
)
def test_timm_refuses_with_one_short_message(name, kwargs, said):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=said) as caught:
        build_model(name, num_classes=10, **kwargs)
    assert len(str(caught.value)) < 600


def test_a_library_that_is_missing_or_broken_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelNameError, match=r"timm is not installed: pip install 'tune_topkd\[vit\]'"):
        build_model("timm:resnet18", num_classes=10)

    def broken(name):
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr("tune_topkd.models.building.importlib.import_module", broken)
    with pytest.raises(
        ModelNameError, match=r"torchvision: .*: RuntimeError: operator torchvision::nms does not exist"
    ):
        build_model("torchvision:resnet18", num_classes=10)


# --- others' factories ----------------------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch import nn

MEAN = torch.tensor(0.5)

class Net(nn.Sequential):
    def __init__(self, num_classes, width=4):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_classes))

class Made:
    net = staticmethod(lambda *, num_classes: Net(num_classes))

def fails(num_classes):
    raise KeyError("layer")

def nothing(num_classes):
    pass

def fixed():
    return Net(3)

def draws(num_classes):
    net = Net(num_classes)
    net[1].weight.data *= net[1].weight.std().item()
    return net
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_networks.py").write_text(FACTORIES)
    (tmp_path / "their_broken.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_networks"
    sys.modules.pop("their_networks", None)


@pytest.mark.parametrize("factory", ["Net", "Made.net", "draws"])
def test_a_factory_elsewhere_is_called_with_the_classes(module, factory):
    config = ModelConfig(name=f"{module}:{factory}")
    check_model(config, num_classes=6)
    assert build_configured(config, num_classes=6)(torch.rand(2, 1, 8, 8)).shape == (2, 6)
    assert sys.modules[module].MEAN.item() == 0.5


def test_a_factory_elsewhere_gets_its_kwargs(module):
    assert build_model(f"{module}:Net", num_classes=6, width=9)[1].out_features == 9


@pytest.mark.parametrize(
    ("name", "kwargs", "kind", "said"),
    [
        ("their_networks:fails", {}, ValueError, "model 'their_networks:fails': KeyError: 'layer'"),
        ("their_networks:fixed", {}, ValueError, "TypeError: .*unexpected keyword argument 'num_classes'"),
        ("their_networks:Net", {"wide": 3}, ValueError, "TypeError: .*unexpected keyword argument 'wide'"),
        ("their_networks:nothing", {}, ModelNameError, r"must give a torch\.nn\.Module, but gave a NoneType"),
        ("their_networks:MEAN", {}, ModelNameError, "must be callable, but is a Tensor"),
        ("their_networks:Nt", {}, ModelNameError, "cannot be imported: AttributeError"),
        ("their_broken:Net", {}, ModelNameError, "cannot be imported: .*'no_such_dependency'"),
    ],
)
def test_a_factory_elsewhere_that_fails_is_one_error(module, name, kwargs, kind, said):
    with pytest.raises(ValueError, match=said) as caught:
        build_model(name, num_classes=6, **kwargs)
    assert type(caught.value) is kind


# --- the size of the images, the head --------------------------------------------------------------------------------


def test_image_size_resizes_before_the_network_and_keeps_the_keys():
    torch.manual_seed(0)
    config = ModelConfig(name="resnet8", image_size=16)
    network, plain = build_configured(config, num_classes=3).eval(), build_model("resnet8", num_classes=3).eval()
    assert network.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(network.state_dict())
    batch = torch.rand(2, 3, 32, 24)
    small = functional.interpolate(batch, (16, 16), mode="bilinear", antialias=True, align_corners=False)
    for copied in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with torch.no_grad():
            assert torch.equal(copied(batch), plain(small))
            assert torch.equal(copied(small), plain(small))


def test_image_size_lets_a_transformer_see_small_images():
    network = build_configured(ModelConfig(name="deit_tiny", kwargs={"image_size": 64}, image_size=64), num_classes=3)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "head", "features"),
    [
        ("digits_linear", "1", 64),
        ("digits_cnn_tiny", "classifier", 8),
        ("resnet8", "fc", 64),
        ("vgg8", "classifier", 512),
        ("MobileNetV2", "classifier.0", 1280),
        ("ShuffleV2", "linear", 1024),
        ("deit_tiny", "heads.head", 192),
        ("torchvision:mobilenet_v3_small", "classifier.3", 1024),
    ],
)
def test_the_head_is_the_last_linear_map(name, head, features):
    with torch.device("meta"):
        network = build_model(name, num_classes=5)
    found, module = find_head(network)
    assert (found, module.in_features, module.out_features) == (head, features, 5)
    assert network.get_submodule(found) is module


def test_a_network_without_a_linear_map_has_no_head():
    with pytest.raises(ValueError, match=r"Sequential has no head: it holds no torch\.nn\.Linear"):
        find_head(nn.Sequential(nn.Conv2d(1, 2, 3)))
