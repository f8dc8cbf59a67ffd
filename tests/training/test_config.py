"""Configurations from the command line, presets and YAML files."""

import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import yaml

import srpkd.presets
from srpkd.defaults import KD_WEIGHT, SRP_WEIGHT
from srpkd.training.config import parse_arguments, presets, to_yaml
from srpkd.training.hints import PUBLIC_OPTIONS
from srpkd.training.option_groups import OPTIONS
from srpkd.training.options import ResolvedConfig, TrainConfig, teacher_config, variant_config

HERE = "--dataroot=x"
TEACHER = "--teacher=t.pth"


def parse(*arguments: str) -> ResolvedConfig:
    return parse_arguments(arguments)


# Sources of options


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_flags_win_over_files_and_files_over_presets_in_any_order(yaml_file, order):
    groups = [["--preset", "resnet9-64to16"], [yaml_file("{ngf: 8, teacher_ngf: 9}")], ["--ngf", "4", HERE]]
    config = parse(*(argument for number in order for argument in groups[number]))
    assert (config.ngf, config.teacher_ngf, config.teacher_netG, config.lr) == (4, 9, "resnet_9blocks", 0.0002)


def test_a_later_file_wins_over_an_earlier_one(yaml_file):
    first, second = yaml_file("{ngf: 8, ndf: 9}"), yaml_file("ngf: 10")
    assert parse(first, second, HERE).ngf == 10
    assert parse(second, first, HERE).ngf == 8
    assert parse(second, first, HERE).ndf == 9
    both = ["--preset=resnet9-64to16", "--preset=resnet9-64to32"]
    assert (parse(*both, HERE).ngf, parse(*both[::-1], HERE).ngf) == (32, 16)
    assert parse("--ngf=1", "--ngf=2", HERE).ngf == 2


def test_an_empty_command_line_means_the_demo(monkeypatch):
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
def test_yaml_round_trip(yaml_file, arguments):
    config = parse(*arguments)
    assert parse(yaml_file(to_yaml(config))) == config


# Booleans


def test_antialias_without_a_value_means_both(yaml_file):
    assert parse(HERE).antialias == "none"
    assert parse(HERE, "--antialias").antialias == parse("--antialias", HERE).antialias == "both"
    for value in ("none", "down", "up", "both"):
        assert parse(HERE, "--antialias", value).antialias == parse(HERE, f"--antialias={value}").antialias == value
        assert parse(HERE, yaml_file(f"antialias: {value}")).antialias == value
    assert parse(HERE, TEACHER, "--variants={a: {antialias: up}}").variants == {"a": {"antialias": "up"}}


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
def test_booleans_with_and_without_a_value(name, form, value):
    config = parse(HERE, "--ngf=3", *(argument.format(name) for argument in form))
    assert vars(config)[name] is value
    assert config.ngf == 3


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ngff", "3"], "unknown option --ngff; did you mean --ngf?"),
        (["--ngff=3"], "unknown option --ngff; did you mean --ngf?"),
        (["--no-flip"], "unknown option --no-flip; did you mean --no_flip?"),
        (["--confg", "a.yaml"], "unknown option --confg; did you mean --config?"),
        (["--zzzz"], "unknown option --zzzz"),
        (["--preset", "horse2zebr"], "unknown preset 'horse2zebr'; did you mean horse2zebra?; presets: apple2"),
        (["--preset"], "--preset needs a value"),
        (["--config", "--ngf", "3"], "--config needs a value"),
        (["stray"], "unrecognized arguments: stray"),
        (["--ngf", "3", "-x"], "unrecognized arguments: -x"),
        (["--ngf"], "--ngf needs a value"),
        (["--seed", "--name", "a", "5"], "--seed needs a value"),
        (["--ngf", "x"], "--ngf x: expected a whole number"),
        (["--ngf", "2.5"], "--ngf 2.5: expected a whole number"),
        (["--ngf", "1:30"], "--ngf 1:30: expected a whole number"),
        ([TEACHER, "--variants={a: {ngf: 1:30}}"], "variant 'a': --ngf 1:30: expected a whole number"),
        (["--max_dataset_size", "x"], "--max_dataset_size x: expected a whole number or inf"),
        (["--max_dataset_size", "2.5"], "--max_dataset_size 2.5: expected a whole number or inf"),
        (["--max_dataset_size=-inf"], "--max_dataset_size -inf: expected a whole number or inf"),
        (["--niter", "3"], "unknown option --niter: use --n_epochs, "),
        (["--niter_decay", "3"], "unknown option --niter_decay: use --n_epochs_decay, "),
        (["--epoch", "latest"], "unknown option --epoch: use --resume NAME: a stopped run resumes, and a finished"),
        (["--load_iter", "3"], "unknown option --load_iter: use --resume NAME"),
        (["--phase", "train"], "unknown option --phase: training reads the training images and evaluates on the test"),
        (["--suffix", "x"], "unknown option --suffix: use --name for the whole name of the run"),
        (["--verbose"], "unknown option --verbose: srpkd profile WEIGHTS prints the size of a network"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--lr", "nan"], "--lr nan: expected a number"),
        (["--no_flip", "maybe"], "--no_flip maybe: expected true or false"),
        (["--model", "cyclegan"], "--model cyclegan: expected pix2pix or cycle_gan"),
        (["--norm", "none"], "--norm none: expected instance or batch; students do not train well without"),
        (["--gan_mode=wgangp"], "--gan_mode wgangp: expected lsgan or vanilla; the gradient penalty is not imp"),
        (
            ["--gpu_ids", "0,1"],
            "unknown option --gpu_ids: use --device cuda:1 or --device cpu; for several GPUs, to",
        ),
        (["--antialias=dwn"], "--antialias dwn: expected none or down or up or both"),
        (["--no_antialias"], "unknown option --no_antialias: without --antialias there is no anti-aliasing"),
        (["--no_antialias_up"], "unknown option --no_antialias_up: use --antialias down"),
        (
            ["--continue_train"],
            "unknown option --continue_train: use --resume NAME: a stopped run resumes, and a finished one is ",
        ),
        (["--lr_policy", "step"], "unknown option --lr_policy: the schedule is the public code's linear one"),
        (["--input_nc", "2"], "--input_nc 2: expected 1 or 3"),
        (["--layers", "model.9"], "--layers model.9: expected a mapping in YAML, {name: value, ...}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_messages_about_a_wrong_command_line(usage_error, arguments, message):
    assert usage_error(*arguments).startswith(message)
    assert usage_error(HERE, *arguments).startswith(message)


def test_arguments_after_an_empty_one_are_read(usage_error):
    assert parse("--teacher", "", HERE, "--ngf", "5").ngf == 5
    assert usage_error("--dataroot", "", "--ngff", "5") == "unknown option --ngff; did you mean --ngf?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ngff: 3", "unknown option 'ngff'; did you mean ngf?"),
        ("on: 3", "unknown option 'on'"),
        ("- ngf\n- 3", "expected options as `name: value` lines, received list"),
        ("just text", "expected options as `name: value` lines, received str"),
        ("false", "expected options as `name: value` lines, received bool"),
        ("{ngf: 3", "is not YAML"),
        ("ngf: !!python/object:os.system x", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("ngf: 3\nndf: 3\nngf: 4", "is not YAML: 'ngf' is in line 1 and again in line 3: remove one"),
        ("variants: {a: {ngf: 3}, a: {ngf: 4}}", "is not YAML: 'a' is in line 1 and again in line 1: remove one"),
    ],
)
def test_messages_about_a_wrong_file(usage_error, yaml_file, content, message):
    flag = yaml_file(content)
    assert usage_error(HERE, flag).startswith(f"{flag.replace('=', ' ')}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ngf: many", "--ngf many: expected a whole number"),
        ("no_flip: 3", "--no_flip 3: expected true or false"),
        ("ngf: 2026-01-01", "--ngf 2026-01-01: expected a whole number"),
        ("lr: .nan", "--lr NaN: expected a number"),
        ("time_budget: 1:30", "--time_budget 1:30: expected a number"),
        ("lr: 1:30.5", "--lr 1:30.5: expected a number"),
        ("name:", "--name null: expected a text"),
        ("variants: null", "--variants None: expected a mapping"),
        ("variants: {a: }", "--variants None: expected a mapping in YAML, {name: {option: value, ...}, ...}, where"),
    ],
)
def test_messages_about_a_wrong_value_in_a_file(usage_error, yaml_file, content, message):
    assert usage_error(HERE, yaml_file(content)).startswith(message)


def test_a_missing_file(usage_error, tmp_path):
    path = tmp_path / "none.yaml"
    assert usage_error("--config", str(path)) == f"--config {path}: cannot be read: No such file or directory"
    assert "Is a directory" in usage_error("--config", str(tmp_path))


def test_empty_files_and_number_formats_of_yaml(yaml_file):
    assert parse(HERE, yaml_file("")) == parse(HERE, yaml_file("# nothing")) == parse(HERE)
    config = parse(HERE, yaml_file("{lr: 1e-3, name: 2024, time_budget: null}"))  # PyYAML reads 1e-3 as a string
    assert (config.lr, config.name, config.time_budget) == (0.001, "2024", None)


@pytest.mark.parametrize(
    ("text", "number"), [("010", 10), ("-010", -10), ("+010", 10), ("0_10", 10), ("1_000", 1000), ("0x10", 16)]
)
def test_numbers_are_decimal_in_files_and_flags(yaml_file, text, number):
    """YAML 1.1, which PyYAML and the parser read, has octal numbers."""
    for flags in ([f"--seed={text}"], ["--seed", text], [yaml_file(f"seed: {text}")]):
        assert parse(HERE, *flags).seed == number
    variants = f"{{a: {{no_flip: true, ngf: {text.removeprefix('-')}}}}}"
    for flag in (f"--variants={variants}", yaml_file(f"variants: {variants}")):
        assert parse(HERE, TEACHER, flag).variants == {"a": {"no_flip": True, "ngf": abs(number)}}


@pytest.mark.parametrize("text", ["2026-01-31", "2026-13-45", "007", "1.10", "12:30", "on"])
def test_names_are_read_as_they_are_written(yaml_file, text):
    """YAML reads some of them as 7, 1.1, 750 and true."""
    config = parse(HERE, "--teacher=t", yaml_file(f"{{name: {text}, variants: {{{text}: {{ngf: 8}}}}}}"))
    assert config.name == text and config.variants == {text: {"ngf": 8}}


@pytest.mark.parametrize("text", ["null", "~", "10"])
def test_names_of_variants_are_texts(yaml_file, text):
    variants = f"{{{text}: {{ngf: 8}}}}"
    for flag in (f"--variants={variants}", yaml_file(f"variants: {variants}")):
        assert parse(HERE, "--teacher=t", flag).variants == {text: {"ngf": 8}}


def test_mappings_that_are_merged_into_others(yaml_file):
    """Two into one, and one that is itself merged, into a mapping that is read before it."""
    content = "{variants: {a: &a {<<: {ngf: 3, ndf: 8}, ngf: 4}, b: {<<: *a, <<: {lr: 0.5}}}, <<: *a}"
    config = parse(HERE, "--teacher=t", yaml_file(content))
    assert config.variants == {"a": {"ngf": 4, "ndf": 8}, "b": {"ngf": 4, "ndf": 8, "lr": 0.5}}
    assert (config.ngf, config.ndf) == (4, 8)


@pytest.mark.parametrize("text", ["null", "inf", ".inf"])
def test_no_limit_of_the_images(yaml_file, text):
    config = parse(HERE, yaml_file(f"{{max_dataset_size: {text}, teacher_netG: unet_256}}"))
    assert config.max_dataset_size is config.teacher_max_dataset_size is None
    config = parse(HERE, "--max_dataset_size=5", "--teacher_netG=unet_256", yaml_file("teacher_max_dataset_size: inf"))
    assert config.max_dataset_size == 5 and teacher_config(config).max_dataset_size is None
    again = parse(yaml_file(to_yaml(config)))
    assert again == config
    assert TrainConfig(dataroot="x", max_dataset_size=math.inf).resolved().max_dataset_size is None
    variants = "variants: {a: {max_dataset_size: inf}}"
    config = parse(HERE, "--max_dataset_size=5", "--teacher_netG=unet_256", yaml_file(variants))
    assert variant_config(config, "a").max_dataset_size is None


# Command lines of the public code


def test_hints_name_options_that_exist():
    for name, hint in PUBLIC_OPTIONS.items():
        assert name not in OPTIONS
        flags = re.findall(r"--(\w+)", hint)
        assert set(flags) <= {*OPTIONS, "nproc_per_node"}, hint


PUBLIC = """
    --dataroot ./datasets/horse2zebra --name h2z --model cycle_gan --teacher path.pth --ngf 16
    --direction BtoA --netG resnet_6blocks --netD n_layers --n_layers_D 2 --norm batch --ndf 32
    --n_epochs 3 --n_epochs_decay 4 --lr 0.0001 --beta1 0.4 --batch_size 2 --load_size 142 --crop_size 128
    --preprocess scale_width_and_crop --no_flip --pool_size 10 --gan_mode vanilla --lambda_A 1 --lambda_B 2
    --lambda_identity 0 --lambda_L1 3 --dataset_mode unaligned --serial_batches --num_threads 1
    --max_dataset_size 9 --input_nc 1 --output_nc 1 --init_type xavier --init_gain 0.1 --no_dropout
    --print_freq 5 --save_epoch_freq 6
"""


def test_options_of_the_public_code_are_accepted():
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
    assert {name: vars(config)[name] for name in expected} == expected


# Help


def test_help_mentions_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in [*OPTIONS, "preset", "config"] if f"--{name} " not in text] == []
    words = re.sub(r"\s+", " ", text)
    assert ", ".join(presets()) in words
    # every option has a help text beside its type
    bare = [name for name in OPTIONS if re.search(rf"--{name} \S+ \(type", words)]
    assert bare == []


def test_help_shows_the_default_weights(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    words = re.sub(r"\s+", " ", capsys.readouterr().out)
    for weights in (KD_WEIGHT, SRP_WEIGHT):
        assert f"default: {weights['pix2pix']:g} for pix2pix, {weights['cycle_gan']:g} for cycle_gan" in words


def test_presets_are_files_of_options():
    [folder] = map(Path, srpkd.presets.__path__)
    assert presets() == sorted(path.stem for path in folder.glob("*.yaml"))
    for name in presets():
        assert yaml.safe_load((folder / f"{name}.yaml").read_text("utf-8")).keys() <= OPTIONS.keys()


def test_without_the_parser_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r'srpkd train needs jsonargparse: pip install "srpkd\[train\]"'):
        parse_arguments([])
