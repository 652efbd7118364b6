"""What `similarity` and `consistency` share: networks by name, a task, and how much of its data to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from scale_guide.build import build_task
from scale_guide.config import Recipe, TaskConfig
from scale_guide.evaluate import Samples
from scale_guide.lookup import closest
from scale_guide.networks import Source, find_network
from scale_guide.recipe import Option

NETWORKS = (
    "Each a run folder (its target, trained), or a model: a name of scale_guide/models or package.module:callable, "
    "such as torchvision.models:resnet18. MODEL=WEIGHTS loads trained weights, of any kind that guide.weights takes."
)
READING = {
    "data": Option("", "Short for --task.options.data: where the samples are."),
    "batch_size": Option(64, "Samples that run at a time on each process."),
    "num_workers": Option(0, "Data-loading processes per rank; 0: none beside the rank itself."),
}


@dataclass(frozen=True)
class Request:
    """A command line that was understood.

    Attributes:
        sources: The networks, run folders called by as much of their paths as tells them apart.
        samples: Of the first run's own task, or of images, with what the command line changes.
        options: The values of the command's own options.
    """

    sources: list[Source]
    samples: Samples
    options: dict[str, Any]

    @property
    def run(self) -> Path | None:
        """The run folder if nothing else is named."""
        return self.sources[0].run if len(self.sources) == 1 else None


def read_request(command: str, arguments: Sequence[str], extra: Mapping[str, Option]) -> Request:
    """Returns what a command line asks for.

    Args:
        command: Name of the command.
        arguments: What follows it.
        extra: The command's own options, `rows` among them.

    Raises:
        ValueError: an unknown option, network or task, or data that cannot be read.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"scale-guide {command}", exit_on_error=False)
    parser.add_argument("networks", nargs="+", type=str, help=NETWORKS)
    parser.add_class_arguments(TaskConfig, "task")
    for name, option in {**extra, **READING}.items():
        parser.add_argument(f"--{name}", type=type(option.default), default=option.default, help=option.help)
    _check_names(command, arguments, ["task", "task.name", "task.options", "help", *extra, *READING])
    sources = _called([find_network(word) for word in _parse(parser, arguments)["networks"]])
    recipe = next((source.recipe for source in sources if source.run is not None), Recipe())
    parser.set_defaults({"task.name": recipe.task.name, "task.options": recipe.task.options})
    given = _parse(parser, arguments)
    config = TaskConfig(**given.pop("task"))
    if data := given.pop("data"):
        config.options["data"] = data
    reading = {name: given.pop(name) for name in ("batch_size", "num_workers")}
    return Request(sources, Samples(build_task(Recipe(task=config)), given.pop("rows"), **reading), given)


def _called(sources: Sequence[Source]) -> list[Source]:
    num_different = len({source.run or source.label for source in sources})
    num_parts, labels = 0, list[str]()
    while len(set(labels)) < num_different:
        num_parts += 1
        labels = [str(Path(*s.run.parts[-num_parts:])) if s.run is not None else s.label for s in sources]
    return [replace(source, label=label) for source, label in zip(sources, labels, strict=True)]


def _check_names(command: str, arguments: Sequence[str], known: Sequence[str]) -> None:
    for word in arguments:
        name = word[2:].partition("=")[0]
        if word.startswith("--") and name not in known and not name.startswith("task.options."):
            raise ValueError(
                f"--{name} is not an option{closest(name, known)}. `scale-guide {command} --help` lists them."
            )


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    try:
        return parser.parse_args(list(arguments)).as_dict()
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
