"""Meshes for federations on several devices."""

if __name__ != "fedcl.tpu":
    raise ImportError(
        "import `fedcl.tpu`, not `tpu`: the repository root is on sys.path"
    )

from fedcl.tpu._mesh import mesh as mesh
