"""``prunetune serve``."""

from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs.serving import ServeConfig


def run(config: str | None, overrides: list[str]) -> None:
    """Serve one arm behind an OpenAI-compatible endpoint: chat completions, models, health and metrics.

    The model runs in this process, or tower, pruner and projector do and a stock vLLM server is given the features.
    SIGTERM and Ctrl-C finish what is in flight and refuse new requests with 503; a second one ends at once.
    """
    from prunetune.configs import load_config, to_yaml
    from prunetune.serving.run import serve

    settings = load_config(ServeConfig, config, overrides)
    print(to_yaml(settings))
    serve(settings)


command = SchemaCommand("serve", ServeConfig, callback=run, params=[config_option()], help=run.__doc__)
