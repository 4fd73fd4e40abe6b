"""`virtio completion`: what a shell needs to complete the command's words."""

import os

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class, split_arg_string

SHELLS = ("bash", "zsh", "fish")
LINE, BREAKS = "_VIRTIO_LINE", "_VIRTIO_WORDBREAKS"
"""Environment variables: the line up to the cursor, and characters that end a word for bash."""


class Bash(BashComplete):
    """For bash, which takes `emulated:net` for three words: the line is split anew here, and bash gets what its own last word lacks."""

    source_template = BashComplete.source_template.replace(
        'COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD', f'{LINE}="${{COMP_LINE:0:COMP_POINT}}" {BREAKS}="$COMP_WORDBREAKS"'
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the last one, and that, which may be empty."""
        line, breaks = os.environ[LINE], os.environ[BREAKS]
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1:].isspace() else ""
        self._taken = incomplete[: 1 + max((incomplete.rfind(each) for each in ":=" if each in breaks), default=-1)]
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """Type and text of what may stand here."""
        return f"{item.type},{item.value.removeprefix(self._taken)}"


add_completion_class(Bash)


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  eval "$(virtio completion bash)"                      in ~/.bashrc
    zsh:   eval "$(virtio completion zsh)"                       in ~/.zshrc
    fish:  virtio completion fish > ~/.config/fish/completions/virtio.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.BadParameter(f"click knows no {shell}")
    root = context.find_root()
    name = str(root.info_name)
    script = kind(root.command, {}, name, f"_{name.upper()}_COMPLETE")
    click.echo(script.source_template % script.source_vars())
