"""The command `python -m zoo.api_cl`: serve a classifier."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from zoo.common.command import CommandParser

if TYPE_CHECKING:
    from collections.abc import Sequence

_DESCRIPTION = """\
Serve a classifier of one task, as an API for others to learn from.

  python -m zoo.api_cl serve --weights api0.safetensors --arch lenet --classes 0,1 --input_shape 1,28,28

It answers images in [-1, 1] with probabilities, in the Open Inference Protocol (/v2/models/NAME/infer, with and without
its binary extension) and in TensorFlow Serving's (/v1/models/NAME:predict). In a config of a stream it is
{type: http, url: "http://127.0.0.1:8000"}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: What follows `python -m zoo.api_cl`; `sys.argv` by default.

    Raises:
        SystemExit: With status 2 after a mistake, which is explained on stderr in one paragraph.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    with parser.explaining():
        _serve(options)


def _parser() -> CommandParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = CommandParser("python -m zoo.api_cl", description=_DESCRIPTION, formatter_class=layout, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve")
    serve = commands.add_parser(
        "serve", help="answer images over HTTP", description=_DESCRIPTION, formatter_class=layout, allow_abbrev=False
    )
    serve.add_argument("--weights", required=True, metavar="FILE", help="a .safetensors file of the network's weights")
    serve.add_argument("--arch", required=True, help="lenet, mlp, resnet18, vgg11, wrn or logistic")
    serve.add_argument(
        "--classes", required=True, type=_numbers, metavar="0,1", help="global labels, in the order of the columns"
    )
    serve.add_argument(
        "--input_shape", required=True, type=_numbers, metavar="C,H,W", help="channels, height, width of an image"
    )
    serve.add_argument("--name", default="model", help="name of the model; 'model' by default")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; this machine alone by default")
    serve.add_argument("--port", type=int, default=8000, help="8000 by default")
    serve.add_argument("--decimals", type=int, help="round the probabilities, as real services do")
    return parser


def _serve(options: argparse.Namespace) -> None:
    from zoo.api_cl.apis import load_network
    from zoo.api_cl.server import classifier_app, serve

    network = load_network(options.weights, options.arch, options.input_shape, len(options.classes))
    app = classifier_app(network, options.classes, options.input_shape, name=options.name, decimals=options.decimals)
    serve(app, options.host, options.port)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers with commas, such as 0,1") from None


if __name__ == "__main__":
    main()
