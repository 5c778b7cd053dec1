"""``prunetune evaluate``."""

from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import EvaluateConfig


def run(config: str | None, overrides: list[str]) -> None:
    """Run one arm on tasks; an interrupted run goes on."""
    from prunetune.configs import load_config, to_yaml
    from prunetune.models.ranks import launched_ranks
    from prunetune.scripts.tracked import tracked_evaluate

    settings = load_config(EvaluateConfig, config, overrides)
    if launched_ranks().is_zero:
        print(to_yaml(settings))
    folder = tracked_evaluate(settings)
    if launched_ranks().is_zero:
        print(f"results: {folder}")


command = SchemaCommand("evaluate", EvaluateConfig, callback=run, params=[config_option()], help=run.__doc__)
