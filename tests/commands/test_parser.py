"""The command line: YAML and options together, and errors that name the field."""

import dataclasses

import pytest

from cps_hf.commands import parser
from cps_hf.commands.help import documented
from cps_hf.commands.settings import Settings
from cps_hf.config import GROUPS, AugmentationConfig, CPSConfig, EvaluationConfig
from cps_hf.objectives import OBJECTIVES, CrossPseudoSupervision, Supervised
from cps_hf.training.setup import to_yaml


def parse(*words, **options):
    return parser.parse(Settings, list(words), **options)


def error_of(capsys, *words, **kwargs) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(*words, **kwargs)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"), [(["true"], True), ([], True), (["false"], False), (["a/b"], "a/b"), (["none"], None)]
)
def test_resuming_takes_a_folder_or_true(words, expected):
    assert parse("--resume_from_checkpoint", *words).args.resume_from_checkpoint == expected


def test_no_arguments_give_the_defaults_and_cps():
    settings = parse()
    assert settings.args == CPSConfig() and settings.objective == CrossPseudoSupervision()
    groups = [type(group) for group in vars(settings).values()]
    assert {*groups} > {*GROUPS} and all(group == type(group)() for group in vars(settings).values())


def test_every_kind_of_value_is_read():
    settings = parse(
        *("--max_steps", "1_000", "--learning-rate=1e-3", "--crop_size", "64", "128", "--random_scale", "1"),
        *("--max_grad_norm", "none", "--disable_tqdm", "--resize_antialias", "false", "--data_root", "x y"),
        *("--lr_scheduler_kwargs", '{"power": 2}', "--report_to", "tensorboard", "trackio"),
        *("--weight", "5", "--cutmix", "false"),
    )
    args, augmentation = settings.args, settings.augmentation
    assert (args.max_steps, args.learning_rate, augmentation.crop_size) == (1000, 1e-3, [64, 128])
    assert (augmentation.random_scale, args.max_grad_norm, args.disable_tqdm) == ([1.0], None, True)
    assert (augmentation.resize_antialias, settings.data.data_root) == (False, "x y")
    assert args.lr_scheduler_kwargs == {"power": 2} and args.report_to == ["tensorboard", "trackio"]
    assert settings.objective == CrossPseudoSupervision(weight=5.0, cutmix=False)


@pytest.mark.parametrize(
    ("words", "expected"), [(["0.5"], 0.5), (["1", "2", "0.5"], [1.0, 2.0, 0.5]), (["none"], None), (["1"], 1.0)]
)
def test_class_weights_are_a_power_or_numbers_and_come_back_from_yaml(tmp_path, words, expected):
    objective = parse("--class_weights", *words, "--labeled_loss", "focal", "--focal_gamma", "1.5").objective
    assert objective == CrossPseudoSupervision(class_weights=expected, labeled_loss="focal", focal_gamma=1.5)
    (tmp_path / "config.yaml").write_text(to_yaml(objective, CPSConfig()))
    assert parse("--config", str(tmp_path / "config.yaml")).objective == objective


def test_stages_averages_colours_and_norms_come_back_from_yaml(tmp_path):
    words = "--pretrain_steps 5 --second_stage_learning_rate_factor 0.5 --ema_decay 0.996 --labeled_color_jitter 0.8"
    settings = parse(*words.split(), "--norm_momentum", "0.01", "--freeze_norms", "true")
    assert settings.args.pretrain_steps == 5 and settings.augmentation.labeled_color_jitter == 0.8
    assert settings.model_config.norm_momentum == 0.01 and settings.model_config.freeze_norms
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    assert parse("--config", str(tmp_path / "config.yaml")) == settings


def test_one_number_is_a_square():
    settings = parse("--crop_size", "64", "--eval_crop_size", "48", "--eval_stride", "32", "--eval_mode", "sliding")
    assert settings.augmentation.crop_size == [64, 64]
    assert (settings.evaluation.eval_crop_size, settings.evaluation.eval_stride) == ([48, 48], [32, 32])
    assert AugmentationConfig(crop_size=40).crop_size == [40, 40] and EvaluationConfig().eval_stride is None


def test_attention_is_a_name_or_a_mapping_for_the_backbone_alone():
    for word, expected in (
        ("sdpa", "sdpa"),
        ('{"backbone_config": "sdpa"}', {"backbone_config": "sdpa"}),
        ("none", None),
    ):
        assert parse("--attn_implementation", word).model_config.attn_implementation == expected


def test_command_line_overrides_file_overrides_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nmax_steps: 7\ncutmix: false\ncrop_size: [32, 48]\n")
    settings = parse(
        *("--config", str(tmp_path / "c.yaml"), "--max_steps", "9"), defaults=lambda given: {"max_steps": 5, "seed": 3}
    )
    assert (settings.args.learning_rate, settings.args.max_steps, settings.args.seed) == (1e-3, 9, 3)
    assert settings.augmentation.crop_size == [32, 48] and settings.objective.cutmix is False


def test_defaults_for_another_objective_are_ignored():
    options = {"defaults": lambda given: {"cps": {"weight": 3.0}, "max_steps": 7}}
    assert parse(**options).objective.weight == 3.0
    assert parse("--objective", "supervised", **options).objective == Supervised()
    settings = parse("--objective", "cpc", **options)
    assert settings.objective.weight == 100.0 and settings.args.max_steps == 7  # its own weight, not another method's


def test_the_resolved_file_reads_back_to_the_same(tmp_path):
    settings = parse(
        "--seed", "5", "--weight", "1.5", "--run_name", "92", "--partition", "1-8", "--hub_license", "mit"
    )
    (tmp_path / "c.yaml").write_text(settings.to_yaml())
    assert parse("--config", str(tmp_path / "c.yaml")) == settings


def test_options_removed_since_an_earlier_version_are_ignored(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text("max_steps: 3\nlogging_first_step: true\n")
    assert parse("--config", str(tmp_path / "old.yaml")).args.max_steps == 3
    assert "`logging_first_step` of the file: no longer an option" in capsys.readouterr().err
    assert "unknown option `--logging_first_step`" in error_of(capsys, "--logging_first_step", "true")


def test_no_file_contains_the_token():
    settings = parse("--hub_token", "hf_secret")
    assert settings.hub.hub_token == "hf_secret"
    assert "hf_secret" not in settings.to_yaml() + repr(settings) + str(settings.flat())


def test_values_change_in_the_group_that_has_them():
    settings = parse()
    changed = settings.with_values(max_steps=3, crop_size=[8, 8], weight=9.0, partition="4")
    assert (changed.args.max_steps, changed.augmentation.crop_size) == (3, [8, 8])
    assert (changed.objective.weight, changed.data.partition) == (9.0, "4")
    different = {key for key, value in changed.flat().items() if settings.flat()[key] != value}
    assert different == {"max_steps", "crop_size", "weight", "partition"} and settings == parse()
    with pytest.raises(TypeError, match="no group has a field max_step"):
        settings.with_values(max_step=3)


def test_another_objective_ignores_the_files_hyper_parameters(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("objective: cps\nweight: 5\nlabeled_loss: ohem\n")
    settings = parse("--config", str(tmp_path / "c.yaml"), "--objective", "supervised")
    assert settings.objective == Supervised(labeled_loss="ohem")
    assert "`weight`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_step", "5"], ["unknown option `--max_step`. Did you mean `--max_steps`?"]),
        (["--max_steps", "many"], ["`--max_steps`", "an integer", "'many'"]),
        (["--max_steps", "1.5"], ["`--max_steps`", "an integer", "'1.5'"]),
        (["--learning_rate", "fast"], ["`--learning_rate`", "a number", "'fast'"]),
        (["--disable_tqdm", "maybe"], ["`--disable_tqdm`", "true or false", "'maybe'"]),
        (["--lr_scheduler_kwargs", "power=2"], ["`--lr_scheduler_kwargs`", "a mapping"]),
        (["--run_name"], ["`--run_name`", "text"]),
        (["--max_steps", "5", "6"], ["`--max_steps`", "an integer"]),
        (["--objective", "cpss"], ["`--objective`", "supervised, cps", "Did you mean `cps`"]),
        (
            ["--objective", "supervised", "--weight", "2"],
            ["unknown option `--weight`", "`--objective supervised`", "It belongs to the objectives cps"],
        ),
        (["--weight", "-1"], ["`--weight`", "-1"]),
        (["--max_steps", "0"], ["`--max_steps`", "1 or more"]),
        (["--learning_rate", "inf"], ["`--learning_rate`", "0 or more", "inf"]),
        (["--weight_decay", "nan"], ["`--weight_decay`", "nan"]),
        (["--adam_beta1", "1"], ["`--adam_beta1`", "0 or more and less than 1", "1.0"]),
        (["--momentum", "9"], ["`--momentum`", "0 or more and less than 1", "9.0"]),
        (["--adam_epsilon", "-1"], ["`--adam_epsilon`", "0 or more"]),
        (["--head_learning_rate_factor", "0"], ["`--head_learning_rate_factor`", "above 0", "freeze_backbone"]),
        (["--backbone_learning_rate_factor", "-1"], ["`--backbone_learning_rate_factor`", "-1"]),
        (["--layer_decay", "0"], ["`--layer_decay`", "above 0 and at most 1"]),
        (
            ["--eval_mode", "sliding", "--eval_crop_size", "8", "9", "--eval_stride", "8", "10"],
            ["`--eval_stride` [8, 10]", "window [8, 9]"],
        ),
        (
            ["--eval_mode", "sliding", "--crop_size", "8", "--eval_stride", "9"],
            ["`--eval_stride` [9, 9]", "window [8, 8]"],
        ),
        (["--eval_crop_size", "8"], ["`--eval_crop_size` [8, 8] would be ignored", "`--eval_mode sliding`"]),
        (["--eval_stride", "8"], ["`--eval_stride` [8, 8] would be ignored", "`--eval_mode` is whole"]),
        (["--adam_beta2", "0.95"], ["`--adam_beta2` 0.95 would be ignored", "`--optim adamw`"]),
        (["--momentum", "0.8", "--optim", "adamw"], ["`--momentum` 0.8 would be ignored", "`--optim` is adamw"]),
        (["--torch_compile_mode", "max-autotune"], ["`--torch_compile_mode` max-autotune", "`--torch_compile true`"]),
        (["--torch_compile_backend", "eager"], ["`--torch_compile_backend` eager would be ignored"]),
        (["--horizontal_flip", "2"], ["`--horizontal_flip`", "from 0 to 1", "2.0"]),
        (["--max_bad_sample_share", "5"], ["`--max_bad_sample_share`", "from 0 to 1", "5.0"]),
        (["--optim", "adam"], ["`--optim`", "'sgd', 'adamw'", "'adam'"]),
        (
            ["--crop_size", "512x256"],
            ["two integers, got '512x256'", "Write `--crop_size 512 256`, or `crop_size: [512"],
        ),
        (["--crop_size", "1", "2", "3"], ["`--crop_size`", "height and width"]),
        (["--seed", "1", "--seed", "2"], ["`--seed` is given twice"]),
        (["train"], ["expected `--field value`", "'train'"]),
        (["--config", "missing.yaml"], ["--config missing.yaml", "No such file"]),
    ],
)
def test_an_error_names_the_field_and_what_is_valid(capsys, words, said):
    message = error_of(capsys, *words)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "learning_rat: 1",
            ["unknown field `learning_rat`", "in the `--config` file. Did you mean the field `learning_rate`?"],
        ),
        ("max_steps: [1, 2]", ["`max_steps`", "an integer"]),
        ("max_steps: true", ["`max_steps`", "an integer, got true"]),
        ("eval_mode: sliding\neval_stride: 8\neval_crop_size: 4", ["`eval_stride` [8, 8]"]),
        ("- a\n- b", ["`field: value` lines", "list"]),
        ("a: [", ["not valid YAML", 'c.yaml", line 1']),
        ("seed: 1\nmax_steps: 5\nseed: 2", ["`seed` is given twice", 'c.yaml", line 3']),
        ("lr_scheduler_kwargs: {power: 1, power: 2}", ["`power` is given twice"]),
        ("a: !!map [b]", ["not valid YAML"]),
        ("a: !!python/object/apply:os.system [ls]", ["not valid YAML"]),
    ],
)
def test_a_bad_file_is_an_error(tmp_path, capsys, text, said):
    (tmp_path / "c.yaml").write_text(text)
    message = error_of(capsys, "--config", str(tmp_path / "c.yaml"))
    for part in said:
        assert part in message


def help_of(capsys, *words, **options) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(*words, **options)
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", OBJECTIVES)
def test_full_help_lists_every_field_with_text_and_default(capsys, name):
    defaults = {"defaults": lambda given: {"max_steps": 77}}
    text = help_of(capsys, "--help-all", "--objective", name, description="what it does", **defaults)
    assert "What it does." in text and "the data set's folder" in text and "(default: 77)" in text
    assert f"objective {name}: {OBJECTIVES[name].__name__}" in text
    for cls in parser.groups_of(Settings, name).values():
        for f in dataclasses.fields(cls):
            assert f"--{f.name} " in text and documented(cls)[f.name][1], f.name


def test_short_help_points_to_the_full_help(capsys):
    text = help_of(capsys, "--help", first=("max_steps", "data_root"))
    options = {word for word in text.split() if word.startswith("--")}
    assert options >= {"--max_steps", "--data_root", "--objective", "--config"} and "--seed" not in options
    assert "`cps-hf train --help-all` shows all options" in text and len(text.splitlines()) < 40


def test_help_shows_the_values_of_the_file_as_defaults(tmp_path, capsys):
    options = '{"reduce_labels": true}'
    (tmp_path / "c.yaml").write_text(f"max_steps: 12345\nweight: 6.5\nload_options: {options}\n")
    text = help_of(capsys, "--config", str(tmp_path / "c.yaml"), "--help-all")
    assert "(default: 12345)" in text and "(default: 6.5)" in text
    assert f"(default: {options})" in " ".join(text.split())  # as it would be typed


def test_a_setting_that_is_no_field_cannot_hide():
    with pytest.raises(TypeError):
        CPSConfig(learning_rat=1)
