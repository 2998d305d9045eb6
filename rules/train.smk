# From tokens to a Hugging Face checkpoint.

rule teacher:
    input:
        needs("teacher"),
    output:
        "results/store/teacher/{id}/manifest.json",
    log:
        "results/logs/teacher/{id}.log",
    conda:
        "../envs/train.yaml"
    threads: run_setting("teacher", "threads", 1)
    resources:
        gpu=run_setting("teacher", "gpus", 0),
        mem_mb=memory("teacher", "mem_mb", 4000),
        **slurm_only(
            runtime=run_setting("teacher", "runtime_min", 60),
            slurm_extra=slurm_options("teacher"),
        ),
    shell:
        STAGE


rule clip:
    input:
        needs("clip"),
    output:
        "results/store/clip/{id}/manifest.json",
    log:
        "results/logs/clip/{id}.log",
    conda:
        "../envs/train.yaml"
    threads: run_setting("clip", "threads", 1)
    resources:
        gpu=one_gpu("clip"),
        mem_mb=memory("clip", "eval_mem_mb", 8000),
        **slurm_only(
            runtime=run_setting("clip", "eval_runtime_min", 60),
            slurm_extra=slurm_options("clip"),
        ),
    shell:
        STAGE


rule timing:
    input:
        needs("timing"),
    output:
        "results/store/timing/{id}/manifest.json",
    log:
        "results/logs/timing/{id}.log",
    conda:
        "../envs/train.yaml"
    threads: run_setting("timing", "threads", 1)
    resources:
        gpu=one_gpu("timing"),
        mem_mb=memory("timing", "mem_mb", 4000),
        **slurm_only(
            runtime=run_setting("timing", "eval_runtime_min", 60),
            slurm_extra=slurm_options("timing"),
        ),
    shell:
        STAGE


rule score:
    input:
        needs("score"),
    output:
        "results/store/score/{id}/manifest.json",
    log:
        "results/logs/score/{id}.log",
    conda:
        "../envs/train.yaml"
    threads: run_setting("score", "threads", 1)
    resources:
        gpu=one_gpu("score"),
        mem_mb=memory("score", "eval_mem_mb", 8000),
        **slurm_only(
            runtime=run_setting("score", "eval_runtime_min", 60),
            slurm_extra=slurm_options("score"),
        ),
    shell:
        STAGE


rule train:
    input:
        needs("train"),
    output:
        "results/store/train/{id}/manifest.json",
    log:
        "results/logs/train/{id}.log",
    conda:
        "../envs/train.yaml"
    threads: run_setting("train", "threads", 1)
    resources:
        gpu=gpus("train"),
        mem_mb=memory("train", "mem_mb", 4000),
        **slurm_only(
            runtime=run_setting("train", "runtime_min", 60),
            nodes=run_setting("train", "nodes", 1),
            mpi=several_nodes("train", "srun"),
            tasks=run_setting("train", "nodes", 1),
            tasks_per_gpu=0,
            slurm_extra=slurm_options("train"),
        ),
    shell:
        STAGE


rule convert:
    input:
        needs("convert"),
    output:
        "results/store/convert/{id}/manifest.json",
    log:
        "results/logs/convert/{id}.log",
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=memory("convert", "eval_mem_mb", 8000),
        **slurm_only(
            runtime=run_setting("convert", "eval_runtime_min", 60),
            slurm_extra=slurm_options("convert"),
        ),
    shell:
        STAGE

