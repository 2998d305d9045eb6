# The commands of all rules, and their input and resource functions: each asks the plan.

# A signal to a whole job (scancel, preemption, Ctrl-C) must find the stage itself where the shell was, or the job ends
# with the shell while the stage still saves; and must leave its log alone, which ends with the stage anyway.
# Snakemake deletes the log of an attempt before the next one; `.all` keeps them all.
LOGGED = "2> >(trap '' TERM INT HUP; exec tee -a {log} {log}.all >&2)"
STAGE = "exec python -m pipeline_lib stage {output} --threads {threads} " + LOGGED
VIEW = "exec python -m pipeline_lib view {params.source} {output} " + LOGGED


def needs(stage):
    """Input function: the upstream manifests of a stage that do not exist yet."""

    def manifests(wildcards):
        allocation.leave_cores_to_the_cluster(workflow)
        return wiring.inputs(PLAN, stage, wildcards.id)

    return wiring.described(manifests)


def run_setting(stage, key, default):
    """Resource function: an execution setting of the stage."""
    return wiring.described(lambda wildcards: allocation.resource(PLAN, stage, wildcards.id, key, default))


def memory(stage, key, default):
    """Resource function: MB, more after an attempt that was killed for want of it."""
    return wiring.described(lambda wildcards: allocation.memory(PLAN, stage, wildcards.id, key, default))


def gpus(stage):
    """Resource function: GPUs of a training, over all its nodes."""
    return wiring.described(lambda wildcards: allocation.gpus(PLAN, stage, wildcards.id))


def one_gpu(stage):
    """Resource function: one GPU where the experiment's training has any."""
    return wiring.described(lambda wildcards: min(1, allocation.resource(PLAN, stage, wildcards.id, "gpus", 0)))


def slurm_options(stage):
    """Resource function: further options of sbatch."""
    return wiring.described(lambda wildcards: allocation.slurm_options(PLAN, workflow, stage, wildcards.id))


def several_nodes(stage, value):
    """Resource function: `value` for a training on several nodes.

    The executor's word for 'the command starts its own tasks' is mpi: ours starts one torchrun on each node.
    """
    return wiring.described(lambda wildcards: value if allocation.resource(PLAN, stage, wildcards.id, "nodes", 1) > 1 else "")


def slurm_only(**resources):
    """Resources that nothing but Slurm reads: none where nothing is for Slurm, as Snakemake works each out for every job."""
    return resources if allocation.is_for_slurm(workflow) else {}


NETWORK_IS_HERE = PLAN.config.cluster.network_stages == "here"


wildcard_constraints:
    id="[a-z0-9._+-]+-[0-9a-f]{12}",
    experiment="[a-z0-9._+-]+",
    task="[a-z0-9._+-]+",
    name="[a-z0-9._+-]+",
