"""Exported pipelines in a process that has diffusers and cannot import jlt: jobs on stdin, arrays into a file."""

import importlib.abc
import json
import sys


class Refuse(importlib.abc.MetaPathFinder):
    """Finds neither jlt nor jaxtyping, which its sources need."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jlt", "jaxtyping"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main() -> None:
    sys.meta_path.insert(0, Refuse())
    sys.path.append(sys.argv[1])
    try:
        import jlt
    except ModuleNotFoundError:
        pass
    else:
        sys.exit(f"jlt can be imported from {jlt.__file__}")

    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    drawn = {}
    for job in json.loads(sys.stdin.read()):
        pipe = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=True, low_cpu_mem_usage=False)
        pipe.set_progress_bar_config(disable=True)
        if "save" in job:
            pipe.save_pretrained(job["save"])
        images = pipe(**job["call"]).images
        drawn[job["name"]] = np.stack([np.asarray(image) for image in images])
    np.savez(sys.argv[2], **drawn)


main()
