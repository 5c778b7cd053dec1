"""``prunetune evaluate``."""

from pathlib import Path

from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import EvaluateConfig
from prunetune.screen import libraries_in


def run(config: str | None, overrides: list[str]) -> None:
    """Run one arm on tasks; an interrupted run goes on."""
    from prunetune.configs import load_config, to_yaml
    from prunetune.evaluation.run.evaluate import output_folder
    from prunetune.models.ranks import join_ranks
    from prunetune.scripts.tracked import tracked_evaluate

    settings = load_config(EvaluateConfig, config, overrides)
    ranks = join_ranks()
    if ranks.is_zero:
        print(to_yaml(settings))
    with ranks.open_output(output_folder(settings)), libraries_in(Path(settings.output) / "libraries.log"):
        folder = tracked_evaluate(settings)
    if ranks.is_zero:
        print(f"results: {folder}")


command = SchemaCommand("evaluate", EvaluateConfig, callback=run, params=[config_option()], help=run.__doc__)
