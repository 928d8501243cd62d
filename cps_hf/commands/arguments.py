"""argparse for `cps-hf`: short help, one-line errors that suggest the nearest option, no option given twice."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from .errors import fail, nearest, use_options


class ArgumentParser(argparse.ArgumentParser):
    """The options of one command. `--help` shows the most common ones, `--help-all` shows all.

    Args:
        command: its name after `cps-hf`.
        description: what it does.
        first: the options that `--help` shows, without dashes. Positional arguments are always shown.
        usage: what follows the command's name in the usage line.
    """

    def __init__(self, command: str, description: str, *, first: Collection[str], usage: str):
        super().__init__(
            prog=f"cps-hf {command}",
            description=description and f"{description[0].upper()}{description[1:]}.",
            usage=f"cps-hf {command} {usage}",
            formatter_class=_Formatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.first = frozenset(first)
        self.add_argument("-h", "--help", action=_Help, help="show the most common options")
        self.add_argument("--help-all", action=_Help, help="show all options")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Like argparse's, but `--data-root` means `--data_root`, and unknown options are reported first."""
        options = {name[2:]: action for name, action in self._option_string_actions.items() if name.startswith("--")}
        use_options(options, flags=[name for name, action in options.items() if action.nargs == 0])
        words = self._checked(list(args or ()))
        options, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"{rest[0]!r} belongs to no option.")
        return options

    def error(self, message: str) -> NoReturn:
        fail(message)

    def format_help(self, *, everything: bool = False) -> str:
        """Like argparse's, for the most common options or for all."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        left_out = 0
        for group in self._action_groups:
            shown = [action for action in group._group_actions if everything or self._is_first(action)]
            left_out += len(group._group_actions) - len(shown)
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(shown)
            formatter.end_section()
        if left_out:
            formatter.add_text(f"`{self.prog} --help-all` shows all options, {left_out} more.")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def options(self) -> dict[str, tuple[str, ...]]:
        """Every option with dashes, and its allowed values if it lists them."""
        named = [action for action in self._actions if action.option_strings]
        return {action.option_strings[-1]: tuple(map(str, action.choices or ())) for action in named}

    def _is_first(self, action: argparse.Action) -> bool:
        return not action.option_strings or action.dest in self.first or isinstance(action, _Help)

    def _checked(self, words: list[str]) -> list[str]:
        """The words, with options spelled as declared.

        An option that is unknown or given twice ends the command; argparse would silently keep the last value.
        """
        seen, checked = set(), []
        for position, word in enumerate(words):
            if word == "--":
                return [*checked, *words[position:]]
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                known = self._option_string_actions
                name = name if name in known else name.replace("-", "_").replace("__", "--", 1)
                if name not in known:
                    self.error(f"there is no option `{name}`.{nearest(name, known, otherwise=' See `--help-all`.')}")
                if name in seen:
                    self.error(f"`{name}` is given twice.")
                seen.add(name)
                word = f"{name}{equals}{value}"
            checked.append(word)
        return checked


class _Help(argparse.Action):
    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=options["help"])

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=option_string == "--help-all"), end="")
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Wide lines. Shows every default except None, False and empty lists."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=118)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, argparse.SUPPRESS) or default == [] or "default:" in text:
            return text.replace("%", "%%")
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown})".replace("%", "%%").lstrip()
