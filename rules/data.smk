# From a pinned source to token shards. assets and dataset are the only rules here that use the network.

rule assets:
    localrule: NETWORK_IS_HERE
    input:
        needs("assets"),
    output:
        "results/store/assets/{id}/manifest.json",
    log:
        "results/logs/assets/{id}.log",
    conda:
        "../envs/data.yaml"
    resources:
        **slurm_only(slurm_extra=slurm_options("assets")),
    shell:
        STAGE


rule dataset:
    localrule: NETWORK_IS_HERE
    input:
        needs("dataset"),
    output:
        "results/store/dataset/{id}/manifest.json",
    log:
        "results/logs/dataset/{id}.log",
    conda:
        "../envs/data.yaml"
    resources:
        **slurm_only(slurm_extra=slurm_options("dataset")),
    shell:
        STAGE


rule tokenizer:
    input:
        needs("tokenizer"),
    output:
        "results/store/tokenizer/{id}/manifest.json",
    log:
        "results/logs/tokenizer/{id}.log",
    conda:
        "../envs/data.yaml"
    threads: 2
    resources:
        **slurm_only(slurm_extra=slurm_options("tokenizer")),
    shell:
        STAGE


rule tokens:
    input:
        needs("tokens"),
    output:
        "results/store/tokens/{id}/manifest.json",
    log:
        "results/logs/tokens/{id}.log",
    conda:
        "../envs/data.yaml"
    threads: 2
    resources:
        **slurm_only(slurm_extra=slurm_options("tokens")),
    shell:
        STAGE

