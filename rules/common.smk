# Input and resource functions of all rules: each asks the plan.


def needs(stage):
    """Input function: the upstream manifests of a stage that do not exist yet."""

    def manifests(wildcards):
        wiring.leave_cores_to_the_cluster(workflow)
        return wiring.inputs(PLAN, stage, wildcards.id)

    return manifests


def run_setting(stage, key, default):
    """Resource function: an execution setting of the stage."""
    return lambda wildcards: wiring.resource(PLAN, stage, wildcards.id, key, default)


def one_gpu(stage):
    """Resource function: one GPU where the experiment's training has any."""
    return lambda wildcards: min(1, wiring.resource(PLAN, stage, wildcards.id, "gpus", 0))


wildcard_constraints:
    id="[a-z0-9._+-]+-[0-9a-f]{12}",
    experiment="[a-z0-9._+-]+",
    task="[a-z0-9._+-]+",
    name="[a-z0-9._+-]+",
