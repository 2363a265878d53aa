"""`prx-post tiny data` and `prx-post tiny build`."""

import argparse
from collections.abc import Sequence

from prx_post.base.files import make_folder, require_empty
from prx_post.base.settings import require_installed


def run(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="prx-post tiny", description="The embedded world.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("data", "write its data sets"), ("build", "remake its weights (tens of minutes on two cores)")):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--output_dir", required=True)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--num_threads", type=int, default=0, help="CPU threads; 0 leaves torch's own choice")
    options = parser.parse_args(list(args))
    for module in ("mlxtend", "num2words", "rapidocr", "onnxruntime"):
        require_installed(module, "the embedded world", "demo")
    import torch

    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if options.command == "data":
        from prx_post.tiny.datasets import write_all

        folder = make_folder(require_empty(options.output_dir))
        write_all(folder, options.seed)
    else:
        from pathlib import Path

        from prx_post.tiny.make.build import build

        folder = build(Path(options.output_dir), options.seed)
    print(f"written to {folder}")
