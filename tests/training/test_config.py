import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from srpkd.training.config import parse_arguments, presets, to_yaml
from srpkd.training.options import OPTIONS, VARIANT_OPTIONS, TrainConfig

HERE = "--dataroot=x"
TEACHER = "--teacher=t.pth"


def parse(*arguments: str) -> TrainConfig:
    return parse_arguments(arguments)


@pytest.fixture
def refusal(capsys):
    """What a command line that must be refused is answered with: the text after "error: "."""

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            parse(*arguments)
        assert caught.value.code == 2
        usage, _, message = capsys.readouterr().err.partition("\nerror: ")
        assert usage.startswith("usage: python -m srpkd.train")
        return message.strip()

    return refused


@pytest.fixture
def file(tmp_path):
    """Write a YAML file and give the flag that reads it."""
    numbers = itertools.count()

    def written(content: str | bytes) -> str:
        path = tmp_path / f"{next(numbers)}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"--config={path}"

    return written


# Where options come from


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_flags_win_over_files_and_files_over_presets_in_any_order(file, order):
    groups = [["--preset", "resnet9-64to16"], [file("{ngf: 8, teacher_ngf: 9}")], ["--ngf", "4", HERE]]
    config = parse(*(argument for number in order for argument in groups[number]))
    assert (config.ngf, config.teacher_ngf, config.teacher_netG, config.lr) == (4, 9, "resnet_9blocks", 0.0002)


def test_a_later_file_wins_over_an_earlier_one(file):
    first, second = file("{ngf: 8, ndf: 9}"), file("ngf: 10")
    assert parse(first, second, HERE).ngf == 10
    assert parse(second, first, HERE).ngf == 8
    assert parse(second, first, HERE).ndf == 9
    both = ["--preset=resnet9-64to16", "--preset=resnet9-64to32"]
    assert (parse(*both, HERE).ngf, parse(*both[::-1], HERE).ngf) == (32, 16)
    assert parse("--ngf=1", "--ngf=2", HERE).ngf == 2


def test_without_arguments_it_is_the_demo(monkeypatch):
    demo = parse("--preset", "demo")
    assert demo.is_synthetic and demo.distils and len(demo.variants) == 4
    assert parse() == demo
    monkeypatch.setattr(sys, "argv", ["train"])
    assert parse_arguments() == demo
    monkeypatch.setattr(sys, "argv", ["train", "--ngf", "3", HERE])
    assert parse_arguments() == parse("--ngf", "3", HERE)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset=demo"],
        ["--preset=demo-unpaired", "--no_flip", "--lr=1e-5", "--time_budget=1e9"],
        ["--preset=horse2zebra", "--preset=resnet9-64to16", "--layers={model.9: model.9, model.10: model.12}"],
        [
            "--preset=cityscapes",
            TEACHER,
            "--max_dataset_size=7",
            "--variants={a: {lr: 1e-4, no_dropout: true}, 'b 1': {}}",
        ],
        *([f"--name={name}", "--dataroot={x}", "--teacher=a: #b"] for name in ("null", "true", "1e3", "[a]", "é ü")),
    ],
    ids=" ".join,
)
def test_what_a_run_writes_down_is_read_back(file, arguments):
    config = parse(*arguments)
    assert parse(file(to_yaml(config))) == config


# Booleans


@pytest.mark.parametrize("name", ["no_flip", "serial_batches", "no_dropout"])
@pytest.mark.parametrize(
    ("form", "value"),
    [
        (["--{}"], True),
        (["--{}", HERE], True),
        (["--{}", "true", HERE], True),
        (["--{}=true"], True),
        (["--{}", "false", HERE], False),
        (["--{}=false"], False),
        (["--{}", "--ngf", "3"], True),
    ],
)
def test_a_boolean_stands_with_or_without_a_value(name, form, value):
    config = parse(HERE, "--ngf=3", *(argument.format(name) for argument in form))
    assert getattr(config, name) is value
    assert config.ngf == 3


def test_dropout_is_what_the_model_has_unless_it_is_said():
    assert [parse(HERE, f"--model={model}").no_dropout for model in ("pix2pix", "cycle_gan")] == [False, True]
    assert parse(HERE, "--model=cycle_gan", "--no_dropout=false").no_dropout is False


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ngff", "3"], "there is no option --ngff; did you mean --ngf?"),
        (["--ngff=3"], "there is no option --ngff; did you mean --ngf?"),
        (["--no-flip"], "there is no option --no-flip; did you mean --no_flip?"),
        (["--confg", "a.yaml"], "there is no option --confg; did you mean --config?"),
        (["--zzzz"], "there is no option --zzzz"),
        (["--preset", "horse2zebr"], "there is no preset 'horse2zebr'; did you mean horse2zebra?; there are: apple2"),
        (["--preset"], "--preset needs a value"),
        (["--config", "--ngf", "3"], "--config needs a value"),
        (["stray"], "unrecognized arguments: stray"),
        (["--ngf", "3", "-x"], "unrecognized arguments: -x"),
        (["--ngf"], "argument --ngf: expected one argument"),
        (["--ngf", "x"], "--ngf x: expected a whole number"),
        (["--ngf", "2.5"], "--ngf 2.5: expected a whole number"),
        (["--max_dataset_size", "x"], "--max_dataset_size x: expected a whole number"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--lr", "nan"], "--lr nan: expected a number"),
        (["--no_flip", "maybe"], "--no_flip maybe: expected true or false"),
        (["--model", "cyclegan"], "--model cyclegan: expected pix2pix or cycle_gan"),
        (["--norm", "none"], "--norm none: expected instance or batch; without a norm students do not train well"),
        (["--gan_mode=wgangp"], "--gan_mode wgangp: expected lsgan or vanilla; its gradient penalty is not offered"),
        (
            ["--gpu_ids", "0,1"],
            "there is no option --gpu_ids: say --device cuda:1 or --device cpu; on several GPUs, to",
        ),
        (["--continue_train"], "there is no option --continue_train: go on with a run by --resume NAME"),
        (["--lr_policy", "step"], "there is no option --lr_policy: the learning rate is the public code's linear one"),
        (["--input_nc", "2"], "--input_nc 2: expected 1 or 3"),
        (["--layers", "model.9"], "--layers model.9: expected a mapping in YAML, {name: value, ...}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_answered_in_plain_words(refusal, arguments, message):
    assert refusal(*arguments).startswith(message)
    assert refusal(HERE, *arguments).startswith(message)


def test_nothing_after_an_empty_argument_is_lost(refusal):
    assert parse("--teacher", "", HERE, "--ngf", "5").ngf == 5
    assert refusal("--dataroot", "", "--ngff", "5") == "there is no option --ngff; did you mean --ngf?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ngff: 3", "there is no option 'ngff'; did you mean ngf?"),
        ("on: 3", "there is no option True"),
        ("- ngf\n- 3", "expected options as `name: value` lines, received list"),
        ("just text", "expected options as `name: value` lines, received str"),
        ("false", "expected options as `name: value` lines, received bool"),
        ("{ngf: 3", "is not YAML"),
        ("ngf: !!python/object:os.system x", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
    ],
)
def test_a_wrong_file_is_named(refusal, file, content, message):
    flag = file(content)
    assert refusal(HERE, flag).startswith(f"{flag.replace('=', ' ')}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ngf: many", "--ngf many: expected a whole number"),
        ("no_flip: 3", "--no_flip 3: expected true or false"),
        ("ngf: 2026-01-01", "--ngf 2026-01-01: expected a whole number"),
        ("lr: .nan", "--lr NaN: expected a number"),
        ("variants: null", "--variants None: expected a mapping"),
    ],
)
def test_a_wrong_value_in_a_file_is_found_too(refusal, file, content, message):
    assert refusal(HERE, file(content)).startswith(message)


def test_a_file_that_is_not_there(refusal, tmp_path):
    path = tmp_path / "none.yaml"
    assert refusal("--config", str(path)) == f"--config {path}: cannot be read: No such file or directory"
    assert "Is a directory" in refusal("--config", str(tmp_path))


def test_files_may_say_nothing_or_use_yamls_own_numbers(file):
    assert parse(HERE, file("")) == parse(HERE, file("# nothing")) == parse(HERE)
    config = parse(HERE, file("{lr: 1e-3, name: 2024, n_epochs: 0x10, time_budget: null}"))  # for PyYAML 1e-3 is a text
    assert (config.lr, config.name, config.n_epochs, config.time_budget) == (0.001, "2024", 16, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no dataroot: give the folder of your images, --dataroot PATH"),
        (
            [HERE, "--model=pix2pix", "--dataset_mode=unaligned"],
            "model pix2pix needs pairs: use --dataset_mode aligned",
        ),
        ([HERE, "--teacher_B=b.pth"], "teacher_B, weights from B to A, needs model cycle_gan and teacher"),
        ([HERE, TEACHER, "--teacher_B=b.pth", "--model=pix2pix"], "teacher_B, weights from B to A, needs model cycle"),
        ([HERE, "--n_epochs=0", "--n_epochs_decay=0"], "n_epochs and n_epochs_decay are both 0"),
        (
            [HERE, "--teacher_netG=resnet_6blocks", "--teacher_n_epochs=0", "--teacher_n_epochs_decay=0"],
            "teacher_n_epochs and teacher_n_epochs_decay are both 0",
        ),
        ([HERE, "--variants={a: {}}"], "variants compare students of a teacher"),
        (["--dataroot=:synthetic:", "--input_nc=1"], "generated images have three channels"),
        (["--dataroot=:synthetic:", "--synthetic_pairs=1"], "synthetic_pairs=1: an unpaired task needs two scenes"),
        ([HERE, "--device=gpu"], "device='gpu': expected cpu, cuda, cuda:1"),
        ([HERE, "--device=cuda:99"], "device='cuda:99': torch sees"),
        *(([HERE, f"--name={name}"], f"name={name!r}: expected a plain name") for name in ("", ".", "..", "a/b", "/a")),
    ],
)
def test_contradictions_are_refused(refusal, arguments, message):
    assert refusal("--ngf=2", *arguments).startswith(message)


LEAST = {
    1: "load_size crop_size max_dataset_size teacher_max_dataset_size synthetic_pairs synthetic_test_pairs ngf ndf n_layers_D "
    "teacher_ngf epoch_steps batch_size seeds print_freq save_epoch_freq save_latest_freq update_html_freq",
    0: "num_threads pool_size lambda_L1 lambda_A lambda_B lambda_identity lambda_kd lambda_srp lambda_feature n_epochs "
    "n_epochs_decay teacher_n_epochs teacher_n_epochs_decay beta1 time_budget samples ema",
    16: "synthetic_size",
}


@pytest.mark.parametrize(("name", "least"), [(name, least) for least, names in LEAST.items() for name in names.split()])
def test_every_lower_bound(refusal, name, least):
    assert getattr(parse(HERE, f"--{name}={least}"), name) == least
    assert re.fullmatch(f"{name}={least - 1}(.0)?: expected at least {least}", refusal(HERE, f"--{name}={least - 1}"))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lr=0", "lr=0.0: expected a number above 0"),
        ("--delta=0", "delta=0.0: expected a number above 0"),
        ("--beta1=1", "beta1=1.0: expected a number below 1"),
        ("--ema=1", "ema=1.0: expected a number below 1"),
        ("--clip_grad_norm=0", "clip_grad_norm=0.0: expected a number above 0"),
    ],
)
def test_open_bounds(refusal, flag, message):
    assert refusal(HERE, flag) == message


# Arms


def test_arms_are_options_with_types(file):
    assert parse(HERE, TEACHER, "--variants={a: {}, b: {lambda_kd: 1e-3, no_dropout: true, norm: batch}}").variants == {
        "a": {},
        "b": {"lambda_kd": 0.001, "no_dropout": True, "norm": "batch"},
    }
    # PyYAML reads 1e-3 as a text
    assert parse(HERE, TEACHER, file("variants: {a: {lambda_kd: 1e-3, layers: {m: t}}}")).variants == {
        "a": {"lambda_kd": 0.001, "layers": {"m": "t"}}
    }


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("{a: {lamda_kd: 3}}", "variant 'a': there is no option 'lamda_kd'; did you mean lambda_kd?"),
        ("{a: {lambda_kd: much}}", "variant 'a': --lambda_kd much: expected a number"),
        ("{a: {norm: none}}", "variant 'a': --norm none: expected instance or batch"),
        ("{a: {seed: 3, lambda_kd: 1}}", "variant 'a': seed cannot differ between variants: set it for the whole run"),
        ("{a: {model: pix2pix}}", "variant 'a': model cannot differ between variants"),
        ("{a: {teacher: t.pth}}", "variant 'a': teacher cannot differ between variants"),
        ("{a: }", "--variants None: expected a mapping"),
        ("[a, b]", "--variants ['a', 'b']: expected a mapping"),
        ("{a/b: {}}", "variant 'a/b': expected a plain name"),
        ("{..: {}}", "variant '..': expected a plain name"),
        ("{'': {}}", "variant '': expected a plain name"),
        *((f"{{{name}: {{}}}}", f"variant '{name}': expected a plain name") for name in ("teacher", "input", "truth")),
        ("{a b: {}, a-b: {}}", "variants ['a b', 'a-b']: two of them would share a folder"),
    ],
)
def test_wrong_arms_are_refused(refusal, variants, message):
    assert refusal(HERE, TEACHER, f"--variants={variants}").startswith(message)


def test_what_an_arm_may_set_is_known():
    assert OPTIONS.keys() > VARIANT_OPTIONS
    assert {"lambda_srp", "layers", "normalize", "distance", "netG", "ngf"} < VARIANT_OPTIONS


# What the public code is called with


PUBLIC = """
    --dataroot ./datasets/horse2zebra --name h2z --model cycle_gan --teacher path.pth --ngf 16
    --direction BtoA --netG resnet_6blocks --netD n_layers --n_layers_D 2 --norm batch --ndf 32
    --n_epochs 3 --n_epochs_decay 4 --lr 0.0001 --beta1 0.4 --batch_size 2 --load_size 142 --crop_size 128
    --preprocess scale_width_and_crop --no_flip --pool_size 10 --gan_mode vanilla --lambda_A 1 --lambda_B 2
    --lambda_identity 0 --lambda_L1 3 --dataset_mode unaligned --serial_batches --num_threads 1
    --max_dataset_size 9 --input_nc 1 --output_nc 1 --init_type xavier --init_gain 0.1 --no_dropout
    --print_freq 5 --save_epoch_freq 6
"""


def test_the_public_codes_options_are_taken():
    config = parse(*PUBLIC.split())
    expected = {
        "dataroot": "./datasets/horse2zebra", "name": "h2z", "model": "cycle_gan", "teacher": "path.pth", "ngf": 16,
        "direction": "BtoA", "netG": "resnet_6blocks", "netD": "n_layers", "n_layers_D": 2, "norm": "batch", "ndf": 32,
        "n_epochs": 3, "n_epochs_decay": 4, "lr": 0.0001, "beta1": 0.4, "batch_size": 2, "load_size": 142,
        "crop_size": 128, "preprocess": "scale_width_and_crop", "no_flip": True, "pool_size": 10,
        "gan_mode": "vanilla", "lambda_A": 1, "lambda_B": 2, "lambda_identity": 0, "lambda_L1": 3,
        "dataset_mode": "unaligned", "serial_batches": True, "num_threads": 1, "max_dataset_size": 9, "input_nc": 1,
        "output_nc": 1, "init_type": "xavier", "init_gain": 0.1, "no_dropout": True, "print_freq": 5,
        "save_epoch_freq": 6,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("model", "customs"),
    [
        ("pix2pix", ("aligned", "unet_256", "batch", False, "vanilla")),
        ("cycle_gan", ("unaligned", "resnet_9blocks", "instance", True, "lsgan")),
    ],
)
def test_what_is_left_open_is_filled_in_as_the_public_code_does(model, customs):
    def found(config: TrainConfig) -> tuple:
        return config.dataset_mode, config.netG, config.norm, config.no_dropout, config.gan_mode

    config = parse(HERE, f"--model={model}", "--n_epochs=7", "--n_epochs_decay=8", "--max_dataset_size=9")
    assert found(config) == customs
    assert (config.teacher_n_epochs, config.teacher_n_epochs_decay, config.teacher_max_dataset_size) == (7, 8, 9)
    assert (config.ngf, config.ndf, config.netD, config.lr, config.beta1) == (64, 64, "basic", 0.0002, 0.5)
    assert (config.lambda_A, config.lambda_B, config.lambda_identity, config.lambda_L1) == (10, 10, 0.5, 100)
    assert (config.pool_size, config.batch_size, config.load_size, config.crop_size) == (50, 1, 286, 256)
    assert config.device is None  # the file of a run's options may go to another machine
    assert config.torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert config.resolved() == config


def test_a_teacher_to_load_wins_over_one_to_train():
    config = parse(HERE, TEACHER, "--preset=resnet9-64to16")
    assert (config.teacher, config.teacher_netG, config.distils) == ("t.pth", None, True)


def test_a_process_without_a_gpu_of_its_own(refusal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    message = refusal(HERE, "--device=cuda", "--batch_size=2")
    assert message.startswith(
        "process 1 of this machine has no GPU of its own, torch sees 1: torchrun --nproc_per_node"
    )


# Help


def test_help_mentions_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in [*OPTIONS, "preset", "config"] if f"--{name} " not in text] == []
    words = re.sub(r"\s+", " ", text)
    assert ", ".join(presets()) in words
    # every option has a sentence of its own beside its type
    bare = [name for name in OPTIONS if re.search(rf"--{name} \S+ \(type", words)]
    assert bare == []


def test_presets_are_files_of_options():
    folder = Path(sys.modules["srpkd.training.config"].__file__).parent / "presets"
    assert presets() == sorted(path.stem for path in folder.glob("*.yaml"))
    for name in presets():
        assert yaml.safe_load((folder / f"{name}.yaml").read_text()).keys() <= OPTIONS.keys()
