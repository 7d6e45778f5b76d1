"""One rank of a training run, from its configuration to its last step: everything is put together here."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from biroute.configs.errors import StoppedError
from biroute.configs.layout import resolve_layout
from biroute.configs.load import dump_config
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.loader import open_dataset
from biroute.data_pipeline.manifest import write_atomically
from biroute.launcher.identity import describe, model_identity
from biroute.launcher.observer import Observer
from biroute.launcher.preemption import StopRequest
from biroute.launcher.processes import Place
from biroute.launcher.trainer import Trainer
from biroute.parallel.checkpoint import load_checkpoint
from biroute.parallel.engine import build_engine
from biroute.parallel.megatron import prepare_megatron
from biroute.parallel.mesh import build_mesh


def run(config: RunConfig, place: Place, stop: StopRequest) -> None:
    """Train as one of the ranks that have joined, from the newest checkpoint if there is one. Collective.

    Raises:
        UserError: bad input. StoppedError: a signal came; the state is saved.
    """
    layout = resolve_layout(config, place.world_size)
    dataset = open_dataset(config)
    if place.rank == 0:
        config.train.run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(config.train.run_dir / "config.yaml", dump_config(config).encode())
    observer = (
        Observer(config, {"layout": str(layout), "world_size": str(layout.world_size)}) if place.rank == 0 else None
    )
    status: Any = "FAILED"
    try:
        prepare_megatron(place.device)
        if observer is not None:
            observer.message(describe(config, layout))
        mesh = build_mesh(layout)
        engine = build_engine(config, mesh, place.device)
        checkpoints = config.train.run_dir / "checkpoints"
        about = {"model": model_identity(config, dataset), "layout": str(layout)}
        progress = load_checkpoint(engine, checkpoints, about, observer.message if observer else lambda _: None)
        position = progress.sequences if progress else 0
        loader = dataset.train_loader(data_rank=mesh.at.data, data_size=layout.data, position=position)
        heldout = dataset.heldout_batches(data_rank=mesh.at.data, data_size=layout.data)
        trainer = Trainer(config, engine, loader, heldout, checkpoints, about, stop, observer)
        if progress is not None:
            trainer.resume(progress)
        with loader:
            trainer.fit()
        status = "FINISHED"
    except StoppedError:
        status = "KILLED"
        raise
    finally:
        if observer is not None:
            observer.close(status)
    dist.barrier()  # no rank leaves while another still needs it
