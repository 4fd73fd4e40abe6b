"""`virtio completion`: what a shell needs to complete the command's words."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


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
