"""The command line: YAML and options together, and errors that name the field."""

from dataclasses import dataclass

import pytest

from cps_hf.commands import parser as cli
from cps_hf.config import AugmentationConfig, CPSConfig, ModelConfig
from cps_hf.objectives import CrossPseudoSupervision, Supervised
from cps_hf.training import setup


@dataclass(kw_only=True)
class ScriptArguments(CPSConfig):
    """A script's own fields.

    Data
        data_root: where the images are.
    """

    data_root: str | None = None


def parse(*words, **kwargs):
    return cli.parse(ScriptArguments, list(words), **kwargs)


def error_of(capsys, *words, **kwargs) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(*words, **kwargs)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"), [(["true"], True), ([], True), (["false"], False), (["a/b"], "a/b"), (["none"], None)]
)
def test_resuming_takes_a_folder_or_true(words, expected):
    assert parse("--resume_from_checkpoint", *words)[0].resume_from_checkpoint == expected


def test_no_arguments_give_the_defaults_and_cps():
    settings, objective = parse()
    assert settings == ScriptArguments() and objective == CrossPseudoSupervision()


def test_every_kind_of_value_is_read():
    settings, objective = parse(
        *("--max_steps", "1_000", "--learning-rate=1e-3", "--crop_size", "64", "128", "--random_scale", "1"),
        *("--max_grad_norm", "none", "--disable_tqdm", "--resize_antialias", "false", "--data_root", "x y"),
        *("--lr_scheduler_kwargs", '{"power": 2}', "--report_to", "tensorboard", "trackio"),
        *("--weight", "5", "--cutmix", "false"),
    )
    assert (settings.max_steps, settings.learning_rate, settings.crop_size) == (1000, 1e-3, [64, 128])
    assert (settings.random_scale, settings.max_grad_norm, settings.disable_tqdm) == ([1.0], None, True)
    assert (settings.resize_antialias, settings.data_root) == (False, "x y")
    assert settings.lr_scheduler_kwargs == {"power": 2} and settings.report_to == ["tensorboard", "trackio"]
    assert objective == CrossPseudoSupervision(weight=5.0, cutmix=False)


@pytest.mark.parametrize(
    ("words", "expected"), [(["0.5"], 0.5), (["1", "2", "0.5"], [1.0, 2.0, 0.5]), (["none"], None), (["1"], 1.0)]
)
def test_class_weights_are_a_power_or_numbers_and_come_back_from_yaml(tmp_path, words, expected):
    _, objective = parse("--class_weights", *words, "--labeled_loss", "focal", "--focal_gamma", "1.5")
    assert objective == CrossPseudoSupervision(class_weights=expected, labeled_loss="focal", focal_gamma=1.5)
    (tmp_path / "config.yaml").write_text(setup.to_yaml(objective, CPSConfig()))
    assert parse("--config", str(tmp_path / "config.yaml"))[1] == objective


@pytest.mark.parametrize("group", [CPSConfig, AugmentationConfig, ModelConfig])
def test_stages_averages_colours_and_norms_come_back_from_yaml(tmp_path, group):
    words = {
        CPSConfig: "--pretrain_steps 5 --second_stage_learning_rate_factor 0.5 --ema_decay 0.996",
        AugmentationConfig: "--labeled_color_jitter 0.8",
        ModelConfig: "--norm_momentum 0.01 --freeze_norms true",
    }[group]
    settings, objective = cli.parse(group, words.split())
    assert settings != group()
    (tmp_path / "config.yaml").write_text(setup.to_yaml(objective, settings))
    assert cli.parse(group, ["--config", str(tmp_path / "config.yaml")]) == (settings, objective)


def test_one_number_is_a_square():
    settings, _ = parse("--crop_size", "64", "--eval_crop_size", "48", "--eval_stride", "32", "--eval_mode", "sliding")
    assert (settings.crop_size, settings.eval_crop_size, settings.eval_stride) == ([64, 64], [48, 48], [32, 32])
    assert CPSConfig(crop_size=40).crop_size == [40, 40] and CPSConfig().eval_stride is None


def test_attention_is_a_name_or_a_mapping_for_the_backbone_alone():
    assert parse("--attn_implementation", "sdpa")[0].attn_implementation == "sdpa"
    settings, _ = parse("--attn_implementation", '{"backbone_config": "sdpa"}')
    assert settings.attn_implementation == {"backbone_config": "sdpa"}
    assert parse("--attn_implementation", "none")[0].attn_implementation is None


def test_the_command_line_wins_over_the_file_and_the_file_over_the_scripts_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nmax_steps: 7\ncutmix: false\ncrop_size: [32, 48]\n")
    settings, objective = parse(
        *("--config", str(tmp_path / "c.yaml"), "--max_steps", "9"), defaults={"max_steps": 5, "seed": 3}
    )
    assert (settings.learning_rate, settings.max_steps, settings.seed) == (1e-3, 9, 3)
    assert settings.crop_size == [32, 48] and objective.cutmix is False


def test_a_scripts_defaults_for_another_objective_are_passed_over():
    defaults = {"cps": {"weight": 3.0}, "max_steps": 7}
    assert parse(defaults=defaults)[1].weight == 3.0
    assert parse("--objective", "supervised", defaults=defaults)[1] == Supervised()
    settings, mean_teacher = parse("--objective", "mean_teacher", defaults=defaults)
    assert mean_teacher.weight == 100.0 and settings.max_steps == 7  # its own weight, not that of another method


def test_the_resolved_file_reads_back_to_the_same(tmp_path):
    settings, objective = parse("--seed", "5", "--weight", "1.5", "--run_name", "92")
    (tmp_path / "c.yaml").write_text(cli.to_yaml(settings, objective))
    assert parse("--config", str(tmp_path / "c.yaml")) == (settings, objective)


def test_another_objective_on_the_command_line_leaves_the_files_hyper_parameters_of_its_own_with_a_word(
    tmp_path, capsys
):
    (tmp_path / "c.yaml").write_text("objective: cps\nweight: 5\nlabeled_loss: ohem\n")
    _, objective = parse("--config", str(tmp_path / "c.yaml"), "--objective", "supervised")
    assert objective == Supervised(labeled_loss="ohem")
    assert "`weight`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_step", "5"], ["`max_step`", "Did you mean `max_steps`"]),
        (["--max_steps", "many"], ["`max_steps`", "an integer", "'many'"]),
        (["--max_steps", "1.5"], ["`max_steps`", "an integer", "'1.5'"]),
        (["--learning_rate", "fast"], ["`learning_rate`", "a number", "'fast'"]),
        (["--disable_tqdm", "maybe"], ["`disable_tqdm`", "true or false", "'maybe'"]),
        (["--lr_scheduler_kwargs", "power=2"], ["`lr_scheduler_kwargs`", "a mapping"]),
        (["--run_name"], ["`run_name`", "text"]),
        (["--max_steps", "5", "6"], ["`max_steps`", "an integer"]),
        (["--objective", "cpss"], ["`objective`", "supervised, cps", "Did you mean `cps`"]),
        (
            ["--objective", "supervised", "--weight", "2"],
            ["`weight`", "objective=supervised", "field of the objective cps"],
        ),
        (["--weight", "-1"], ["`weight`", "-1"]),
        (["--max_steps", "0"], ["`max_steps`", "at least 1"]),
        (["--learning_rate", "inf"], ["`learning_rate`", "at least 0", "inf"]),
        (["--weight_decay", "nan"], ["`weight_decay`", "nan"]),
        (["--adam_beta1", "1"], ["`adam_beta1`", "[0, 1)", "1.0"]),
        (["--momentum", "9"], ["`momentum`", "[0, 1)", "9.0"]),
        (["--adam_epsilon", "-1"], ["`adam_epsilon`", "at least 0"]),
        (["--head_learning_rate_factor", "0"], ["`head_learning_rate_factor`", "above 0", "freeze_backbone"]),
        (["--backbone_learning_rate_factor", "-1"], ["`backbone_learning_rate_factor`", "-1"]),
        (["--layer_decay", "0"], ["`layer_decay`", "(0, 1]"]),
        (["--eval_crop_size", "8", "9", "--eval_stride", "8", "10"], ["`eval_stride` [8, 10]", "window [8, 9]"]),
        (["--eval_crop_size", "8"], ["`eval_crop_size` [8, 8] would be ignored", "`eval_mode=sliding`"]),
        (["--eval_stride", "8"], ["`eval_stride` [8, 8] would be ignored", "`eval_mode` is whole"]),
        (["--adam_beta2", "0.95"], ["`adam_beta2` 0.95 would be ignored", "`optim=adamw`"]),
        (["--momentum", "0.8", "--optim", "adamw"], ["`momentum` 0.8 would be ignored", "`optim` is adamw"]),
        (["--torch_compile_mode", "max-autotune"], ["`torch_compile_mode` max-autotune", "`torch_compile=True`"]),
        (["--torch_compile_backend", "eager"], ["`torch_compile_backend` eager would be ignored"]),
        (["--horizontal_flip", "2"], ["`horizontal_flip`", "[0, 1]", "2.0"]),
        (["--max_bad_sample_share", "5"], ["`max_bad_sample_share`", "[0, 1]", "5.0"]),
        (["--optim", "adam"], ["`optim`", "'sgd', 'adamw'", "'adam'"]),
        (["--crop_size", "1", "2", "3"], ["`crop_size`", "height and width"]),
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
        ("learning_rat: 1", ["`learning_rat`", "Did you mean `learning_rate`"]),
        ("max_steps: [1, 2]", ["`max_steps`", "an integer"]),
        ("max_steps: true", ["`max_steps`", "an integer"]),
        ("- a\n- b", ["`field: value` lines", "list"]),
        ("a: [", ["no valid YAML", 'c.yaml", line 1']),
        ("seed: 1\nmax_steps: 5\nseed: 2", ["`seed` is given twice", 'c.yaml", line 3']),
        ("lr_scheduler_kwargs: {power: 1, power: 2}", ["`power` is given twice"]),
        ("a: !!map [b]", ["no valid YAML"]),
        ("a: !!python/object/apply:os.system [ls]", ["no valid YAML"]),
    ],
)
def test_a_bad_file_is_an_error(tmp_path, capsys, text, said):
    (tmp_path / "c.yaml").write_text(text)
    message = error_of(capsys, "--config", str(tmp_path / "c.yaml"))
    for part in said:
        assert part in message


def test_help_lists_every_field_with_its_text_and_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help", "--objective", "cps", description="What it does.", defaults={"max_steps": 77})
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "What it does." in text and "--data_root" in text and "where the images are" in text
    assert "the paper's lambda" in text and "(default: 77)" in text
    import dataclasses

    for cls in (ScriptArguments, CrossPseudoSupervision):
        documented = cli._documented(cls)
        for f in dataclasses.fields(cls):
            assert f"--{f.name} " in text and documented[f.name][1], f.name


def test_help_shows_the_values_of_the_file_as_defaults(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("max_steps: 12345\nweight: 6.5\n")
    with pytest.raises(SystemExit):
        parse("--config", str(tmp_path / "c.yaml"), "--help")
    text = capsys.readouterr().out
    assert "(default: 12345)" in text and "(default: 6.5)" in text


def test_a_setting_that_is_no_field_cannot_hide():
    with pytest.raises(TypeError):
        CPSConfig(learning_rat=1)
