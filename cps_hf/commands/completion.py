"""`cps-hf completion SHELL`: a script with which bash, zsh or fish complete commands, options and known values.

    source <(cps-hf completion bash)                       # in ~/.bashrc
    source <(cps-hf completion zsh)                        # in ~/.zshrc, after compinit
    cps-hf completion fish > ~/.config/fish/completions/cps-hf.fish

The script is generated from the commands' options and does not start Python when a word is completed.
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterable, Mapping, Sequence

from ..objectives import OBJECTIVES
from .arguments import ArgumentParser
from .compare import ComparisonSettings
from .datasets import LOADERS, OWN
from .help import make_help
from .main import COMMANDS
from .parser import groups_of
from .settings import Settings

Options = Mapping[str, tuple[str, ...]]  # option with its dashes -> its allowed values, if listed


def make_parser() -> ArgumentParser:
    parser = ArgumentParser("completion", COMMANDS["completion"], first=(), usage="bash|zsh|fish")
    parser.add_argument("shell", choices=SCRIPTS, help="the shell to print the script for")
    return parser


def main(argv: Sequence[str]) -> None:
    shell = make_parser().parse_args(argv).shell
    print(SCRIPTS[shell]({command: options_of(command) for command in COMMANDS}), end="")


def options_of(command: str) -> Options:
    """All options of a command; for commands that train, the options of every objective."""
    if command not in ("train", "compare"):
        return importlib.import_module(f"{__package__}.{command}").make_parser().options()
    settings = ComparisonSettings if command == "compare" else Settings
    found: dict[str, tuple[str, ...]] = {}
    for name in OBJECTIVES:
        found |= make_help(command, "", groups_of(settings, name).values(), name, {}, first=()).options()
    return found | {"--dataset": (OWN, *LOADERS)}


def bash(commands: Mapping[str, Options]) -> str:
    return _BASH.format(commands=" ".join(commands), values=_of_values(commands), options=_of_options(commands))


def zsh(commands: Mapping[str, Options]) -> str:
    return _ZSH.format(commands=" ".join(commands), values=_of_values(commands), options=_of_options(commands))


def fish(commands: Mapping[str, Options]) -> str:
    lines = ["# from `cps-hf completion fish`"]
    for command, options in commands.items():
        what, begun = shlex.quote(COMMANDS[command]), f"-n '__fish_seen_subcommand_from {command}'"
        lines.append(f"complete -c cps-hf -n __fish_use_subcommand -f -a {command} -d {what}")
        for option, values in options.items():
            known = f" -x -a {shlex.quote(' '.join(values))}" if values else ""
            lines.append(f"complete -c cps-hf {begun} -l {option.removeprefix('--')}{known}")
    shells = f"-n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SCRIPTS)}'"
    return "\n".join([*lines, f"complete -c cps-hf {shells}", ""])


def _of_values(commands: Mapping[str, Options]) -> str:
    """The arms of a shell's `case "COMMAND PREVIOUS-WORD"`: an option's known values."""
    arms = {f"{command} {option}": values for command, own in commands.items() for option, values in own.items()}
    arms["completion completion"] = tuple(SCRIPTS)
    return "\n".join(_arm(key, values) for key, values in arms.items() if values)


def _of_options(commands: Mapping[str, Options]) -> str:
    """The arms of a shell's `case COMMAND`: its options."""
    return "\n".join(_arm(command, options) for command, options in commands.items())


def _arm(key: str, found: Iterable[str]) -> str:
    return f"    {shlex.quote(key)}) found={shlex.quote(' '.join(found))} ;;"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}

_BASH = """\
# from `cps-hf completion bash`
_cps_hf() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} command=${{COMP_WORDS[1]}} found=
  case "$command $before" in
{values}
  esac
  if [ "$COMP_CWORD" = 1 ]; then
    found='{commands}'
  elif [ -z "$found" ] && [ "${{word:0:1}}" = - ]; then
    case "$command" in
{options}
    esac
  fi
  COMPREPLY=($(compgen -W "$found" -- "$word"))
}}
complete -o default -F _cps_hf cps-hf
"""

_ZSH = """\
#compdef cps-hf
# from `cps-hf completion zsh`
_cps_hf() {{
  local found= command=$words[2]
  case "$command $words[CURRENT-1]" in
{values}
  esac
  if (( CURRENT == 2 )); then
    found='{commands}'
  elif [[ -z $found && $PREFIX == -* ]]; then
    case $command in
{options}
    esac
  fi
  if [[ -n $found ]]; then compadd -- $=found; else _files; fi
}}
compdef _cps_hf cps-hf
"""
