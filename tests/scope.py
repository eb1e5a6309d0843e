"""Which tests know a module: MODULES, of what `sampled_mutants` draws from.

The first file of a list is the module's own. `test_sampled_mutants` holds that every module
under FOLDERS is here and that the files exist.
"""

FOLDERS = ("ops", "model", "data")  # every module in them is in scope
_DATA = ("test_data_source.py", "test_data_shards.py")
_MIXERS = ("test_mixers.py", "test_mixers_training.py")
_RECURRENCE = ("test_recurrence.py", "test_recurrence_runs.py")
_LOOKUP = ("test_hashing.py", "test_lookup.py", "test_lookup_native.py")

_TESTS = {
    "data/run_tokenizer": ("test_run_tokenizer.py",),
    "model/__init__": ("test_model.py",),
    "model/implementations": ("test_implementations.py",),
    "model/narrow": ("test_inference.py", "test_packed.py"),
    "model/params": ("test_model.py", "test_optimizer_lean.py"),
    "model/stack": ("test_depth.py", "test_model.py"),
    "runs/steps": ("test_checkpoint.py", "test_ledger.py"),
    "training/programs": ("test_trainer.py", "test_compilations.py"),
    "training/step": (
        "test_trainer.py",
        "test_optimizer_lean.py",
        "test_sharding.py",
        "test_mixers_training.py",
    ),
    "runs/checkpoint": ("test_checkpoint.py", "test_ledger.py", "test_trainer.py"),
    "data/__init__": (*_DATA, "test_data_corpora.py", "test_data_tokenizer.py"),
    "data/__main__": ("test_data_source.py", "test_data_corpora.py"),
    "data/blocks": ("test_data_files.py", "test_data_fuzz.py"),
    "data/tfds_catalogue": ("test_data_corpora.py",),
    "data/corpora": ("test_data_corpora.py",),
    "data/documents": ("test_data_documents.py", "test_data_corpora.py", *_DATA),
    "data/local_files": ("test_data_files.py", "test_data_corpora.py"),
    "data/jsonlines": ("test_data_files.py", "test_data_fuzz.py"),
    "data/layout": ("test_data_layout.py", "test_data_source.py"),
    "data/listing": ("test_data_listing.py", "test_data_files.py"),
    "data/manifest": ("test_data_shards.py", "test_data_source.py"),
    "data/names": ("test_data_files.py", "test_data_corpora.py"),
    "data/options": (
        "test_data_shards.py",
        "test_data_source.py",
        "test_data_corpora.py",
    ),
    "data/progress": ("test_data_documents.py", "test_data_shards.py"),
    "data/shards": ("test_data_shards.py", "test_data_source.py"),
    "data/source": ("test_data_source.py", "test_data_layout.py"),
    "data/tokenizer": ("test_data_tokenizer.py", "test_convert_export.py"),
    "data/vocabulary": ("test_data_tokenizer.py", "test_data_bytes.py"),
    "data/yardsticks": ("test_data_yardsticks.py",),
    "generation/sampler": (
        "test_generation.py",
        "test_inference.py",
        "test_mixers_training.py",
        "test_recurrence.py",
    ),
    "runs/compatibility": (
        "test_fields.py",
        "test_run_tokenizer.py",
        "test_checkpoint.py",
        "test_trainer.py",
    ),
    "evaluation/loss": ("test_evaluation.py", "test_trainer.py"),
    "runs/manifest": ("test_ledger.py", "test_checkpoint.py", "test_trainer.py"),
    "model/layers": ("test_layers.py", "test_model.py", "test_sharding.py"),
    "runs/state_spec": ("test_paths.py", "test_checkpoint.py"),
    "model/losses": ("test_layers.py", "test_evaluation.py", "test_sharding.py"),
    "model/mixers/__init__": (*_MIXERS, "test_mixers_performer.py", "test_model.py"),
    "model/mixers/base": _MIXERS,
    "model/mixers/linformer": ("test_mixers.py", "test_degradation.py", "test_ring.py"),
    "model/mixers/dape": _MIXERS,
    "model/mixers/kernel": (
        "test_mixers_performer.py",
        "test_mixers.py",
        "test_mixers_training.py",
        "test_ring.py",
    ),
    "model/mixers/softmax": (*_MIXERS, "test_ops_attention.py", "test_ring.py"),
    "model/config": ("test_config.py", "test_model.py", "test_mixers.py"),
    "model/transformer": (
        "test_model.py",
        "test_optimizer_lean.py",
        "test_model_chunks.py",
        "test_config.py",
    ),
    "ops/attention": (
        "test_ops_attention.py",
        "test_implementations.py",
        "test_mixers.py",
    ),
    "ops/collectives": ("test_layers.py", "test_sharding.py", "test_ring.py"),
    "ops/remat": ("test_depth.py", "test_model.py"),
    "ops/hashing": ("test_hashing.py", "test_lookup.py"),
    "ops/lookup/__init__": ("test_lookup.py", *_LOOKUP[2:], "test_lookup_gpu.py"),
    "ops/lookup/gpu": ("test_lookup_gpu.py",),
    "ops/lookup/native": ("test_lookup_native.py", "test_packed.py"),
    "ops/lookup/xla": ("test_lookup.py", "test_lookup_native.py"),
    "ops/only_on": ("test_implementations.py", "test_lookup.py"),
    "ops/lookup/narrow": ("test_packed.py", "test_inference.py"),
    "ops/prefix": ("test_ops_prefix.py", "test_mixers.py", "test_ring.py"),
    "ops/random_features": (
        "test_ops_random_features.py",
        "test_mixers_performer.py",
        "test_mixers.py",
        "test_mixers_training.py",
    ),
    "ops/ring": ("test_ring.py",),
    "ops/rotary": ("test_layers.py", "test_mixers.py"),
    "training/optimizer": (
        "test_optimizer.py",
        "test_optimizer_lean.py",
        "test_trainer.py",
    ),
    "files/paths": ("test_paths.py",),
    "model/recurrence/__init__": _RECURRENCE,
    "model/recurrence/base": _RECURRENCE,
    "model/recurrence/memformer": _RECURRENCE,
    "model/recurrence/rmt": _RECURRENCE,
    "sharding": ("test_sharding_mesh.py", "test_sharding.py"),
    "training/spikes": ("test_spikes.py", "test_trainer.py"),
    "training/loop": ("test_trainer.py", "test_sharding.py", "test_mixers_training.py"),
}
MODULES = {f"memoryformer/{name}.py": tests for name, tests in _TESTS.items()}


def paths(prefixes: tuple[str, ...] = ()) -> list[str]:
    """The modules whose name begins with one of `prefixes`; all for none."""
    wanted = tuple(f"memoryformer/{prefix}" for prefix in prefixes or ("",))
    return [path for path in MODULES if path.startswith(wanted)]
