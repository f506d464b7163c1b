"""`python -m dreambooth_moslora page --backend URL`: the page, whose pictures a `serve` draws."""

import argparse
import os

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.extras.serving.client import TOKEN_VARIABLE, RemotePipeline, Service
from dreambooth_moslora.ui import app

__all__ = ["page_arguments", "run_page", "service_of"]


def page_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `app`, and the service."""
    app.add_arguments(parser)
    about = "where `dreambooth_moslora serve` answers, with the same base and adapters"
    parser.add_argument("--backend", metavar="URL", required=True, help=about)
    about = f"its token (default: that of {TOKEN_VARIABLE} in the environment)"
    parser.add_argument("--backend_token", metavar="TOKEN", help=about)


def run_page(args: argparse.Namespace) -> int:
    return app.serve(args, draw_by=service_of(args))


def service_of(args: argparse.Namespace) -> app.Drawer:
    """Draws with a base by the service. Raises UserError for an address that is none."""
    service = Service(args.backend, args.backend_token or os.environ.get(TOKEN_VARIABLE))

    def draw_by(base: Base) -> RemotePipeline:
        return RemotePipeline(service, base.public_name)

    return draw_by
