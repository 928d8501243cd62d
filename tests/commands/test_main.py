"""The entry point: commands, their help, and messages about invalid arguments."""

import io
import re
import subprocess
import sys

import pytest
from support.toy import run_python

import cps_hf
from cps_hf.commands import completion, errors, train
from cps_hf.commands.arguments import ArgumentParser
from cps_hf.commands.main import COMMANDS, main
from cps_hf.data.table import as_typed


def run(capsys, *words) -> tuple[int, str, str]:
    """(status, standard output, standard error) of `cps-hf words`."""
    capsys.readouterr()
    status = 0
    try:
        main(list(words))
    except SystemExit as exit_:
        status = exit_.code or 0
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_help_names_every_command_and_needs_no_library(capsys):
    code = "import sys; from cps_hf.commands.main import main; main(['--help']); print(sorted(sys.modules))"
    done = run_python("-c", code)
    loaded = done.stdout.splitlines()[-1]
    assert not [name for name in ("torch", "numpy", "transformers", "datasets", "yaml") if f"'{name}'" in loaded]
    assert all(re.search(rf"^  {name} +{re.escape(what)}$", done.stdout, re.M) for name, what in COMMANDS.items())
    assert run(capsys, "--version") == (0, f"cps_hf {cps_hf.__version__}\n", "")


@pytest.mark.parametrize("start", [main, lambda words: train.main(words[1:])], ids=["cps-hf", "an example"])
def test_a_command_prints_characters_the_console_lacks(monkeypatch, start):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit):
        start(["train", "--help"])
    sys.stdout.write("道路")
    sys.stdout.flush()
    assert written.getvalue().endswith(b"\\u9053\\u8def")


def test_the_package_is_a_program_too(capsys):
    done = run_python("-m", "cps_hf", "trian")
    assert (done.returncode, done.stdout) == (2, "") and "Did you mean `train`?" in done.stderr


def test_the_package_exports_exactly_the_names_it_lists():
    assert all(getattr(cps_hf, name) is not None for name in cps_hf.__all__) and {*cps_hf.__all__} <= {*dir(cps_hf)}
    with pytest.raises(AttributeError, match="has no attribute 'CPSTriner'"):
        cps_hf.CPSTriner  # noqa: B018


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a command is missing. The commands are train, compare, check, "),
        (["train", __file__], "test_main.py is a file, and a folder is expected. Give a folder of images and masks"),
        (["trian"], "there is no command 'trian'. Did you mean `train`?"),
        (["--objective", "cps"], "there is no command '--objective'. The commands are train, "),
        (["train", "--max_step", "5"], "unknown option `--max_step`. Did you mean `--max_steps`?"),
        (["train", "--max_steps"], "`--max_steps` must be an integer, got no value"),
        (["train", "file.yaml"], "expected a folder of images and masks, found 'file.yaml'. Pass a settings file"),
        (["train", "nowhere"], "No folder nowhere."),
        (
            ["train", "a", "b"],
            "`--data_root` must be text, got ['a', 'b']. Quote values with spaces; DIR comes before",
        ),
        (["train", "--output_dir", "o", "a"], "`--output_dir` must be text, got ['o', 'a']. Quote values with spaces"),
        (["train", "a", "--partition", "3"], "`--partition` cannot be used with a folder of your own"),
        (["check"], "DIR is missing. Give the folder or Hub id of `--dataset folder`"),
        (["check", "a", "b"], "'b' belongs to no option"),
        (["check", "a", "--splits", "x"], "there is no option `--splits`. Did you mean `--split`?"),
        (["evaluate"], "Which branch should be scored? Give RUN, a run's output folder or a branch, or `--branches`."),
        (["evaluate", "--branchs", "a"], "there is no option `--branchs`. Did you mean `--branches`?"),
        (["evaluate", "--branches"], "argument --branches: expected at least one argument"),
        (["evaluate", "--branches", "a", "--num-workers", "no"], "argument --num_workers: invalid int value: 'no'"),
        (["evaluate", "--branches", "a", "--xyz"], "there is no option `--xyz`. See `--help-all`."),
        (["evaluate", "--branches", "a", "--branches", "b"], "`--branches` is given twice"),
        (["evaluate", "--branches", "a", "--out", "b"], "there is no option `--out`. Did you mean `--output_dir`?"),
        (["evaluate", "--branches", "a", "--mode", "half"], "argument --mode: invalid choice: 'half'"),
        (["predict", "--branches", "a", "--output-dir=b", "--output_dir", "b"], "`--output_dir` is given twice"),
        (["predict"], "Which branch should predict? Give RUN, a run's output folder or a branch, or `--branches`"),
        (["convert", "a"], "the following arguments are required: OUT"),
        (["prepare", "--dataset", "voc"], "give either --output_dir or --push_to_hub"),
        (["export", "a"], "the following arguments are required: OUT.onnx"),
        (["app"], "the following arguments are required: BRANCH"),
        (["push", "a"], "the following arguments are required: --repo_id"),
        (["completion", "tcsh"], "argument shell: invalid choice: 'tcsh'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, words, said):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "") and said in err
    assert err.count("\n") == 1 and err.startswith("error: ")


def test_options_are_shown_as_they_are_typed(capsys):
    errors.use_options(["optim", "max_steps", "load_options", "flip"], flags=["flip"])
    python = as_typed(resize_masks=True)
    for message, shown in (
        ("`max_steps` is 3, `optim=adamw`", "`--max_steps` is 3, `--optim adamw`"),
        ("`optim='sgd'` or `max_steps=None`", "`--optim sgd` or `--max_steps none`"),
        ("set `flip=True`, `names` and `images`", "set `--flip`, `names` and `images`"),  # the others are no options
        (f"set {python}.", "set `--load_options '{\"resize_masks\": true}'`."),
        ("the field `max_steps`", "the field `max_steps`"),
        ("two\n  lines", "two lines"),
    ):
        with pytest.raises(SystemExit):
            errors.fail(message)
        assert capsys.readouterr().err == f"error: {shown}\n"
    errors.use_options(["optim"])
    assert errors.for_command_line(f"set {python}.") == f"set {python}."  # the command cannot be told


def test_ctrl_c_ends_a_command_with_the_shells_status_and_no_traceback(capsys, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(completion, "main", interrupted)
    assert run(capsys, "completion", "bash") == (130, "", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_short_and_a_full_help(capsys, command):
    status, short, _ = run(capsys, command, "--help")
    assert status == 0 and short.startswith(f"usage: cps-hf {command} ")
    assert COMMANDS[command][1:] in " ".join(short.split())
    status, whole, _ = run(capsys, command, "--help-all")
    shown, all_of_them = ({*re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.M)} for text in (short, whole))
    known = {*completion.options_of(command)}  # for training commands: the options of every objective
    assert status == 0 and {"--help", "--help-all"} <= shown <= all_of_them <= known and len(shown) <= 14
    assert all_of_them == known or command in ("train", "compare")
    assert ("shows all options" in short) == (shown != all_of_them) and "shows all options" not in whole


def test_help_shows_existing_defaults():
    parser = ArgumentParser("x", "what it does", first=("size", "flag"), usage="[--size N]")
    parser.add_argument("--size", type=int, default=3, help="how 100 % large")
    parser.add_argument("--flag", action="store_true", help="whether")
    parser.add_argument("--name", help="default: the folder's")
    short = parser.format_help()
    assert "how 100 % large (default: 3)" in short and re.search(r"whether$", short, re.M) and "--name" not in short
    assert re.search(r"default: the folder's$", parser.format_help(everything=True), re.M)


def test_options_are_read_with_dashes_too():
    parser = ArgumentParser("x", "what", first=(), usage="")
    parser.add_argument("--output_dir")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--output-dir", "a-b"]).output_dir == "a-b"
    assert parser.parse_args(["--output-dir=a-b"]).output_dir == "a-b"
    assert parser.parse_args(["--", "--output-dir"]).words == ["--output-dir"]


# ------------------------------------------------------------------------------------------------ completion


@pytest.fixture(scope="module")
def scripts():
    commands = {command: completion.options_of(command) for command in COMMANDS}
    return {shell: write(commands) for shell, write in completion.SCRIPTS.items()}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", [*COMMANDS]),
        ("pre", ["predict", "prepare"]),
        ("train --max_s", ["--max_steps", "--max_skipped_steps"]),
        ("train --seed 3 --objective superv", ["supervised"]),
        ("train --streaming ", ["true", "false"]),
        ("train --push_to_h", ["--push_to_hub"]),
        ("evaluate --mode ", ["whole", "sliding"]),
        ("evaluate --branches outputs", []),  # left to the shell: files
        ("completion z", ["zsh"]),
    ],
)
def test_bash_completes_commands_options_and_values(scripts, line, found):
    words = ["cps-hf", *line.split(" ")]
    array = " ".join(f"'{word}'" for word in words)
    script = f"COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _cps_hf; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{scripts['bash']}\n{script}"], capture_output=True, text=True)
    assert done.stderr == "" and sorted(done.stdout.split()) == sorted(found)


def test_every_shell_has_a_script_that_knows_every_option(scripts, capsys):
    for shell, text in scripts.items():
        assert run(capsys, "completion", shell) == (0, text, "")
        for command in COMMANDS:
            for option in completion.options_of(command):
                assert option.removeprefix("--") in text
