"""Which tests know a module: MODULES, of what `sampled_mutants` draws from.

The first file of a list is the module's own. `test_sampled_mutants` holds that every module
under FOLDERS is here and that the files exist.
"""

FOLDERS = ("ops", "model", "data")  # every module in them is in scope
_DATA = ("data/test_data_source.py", "data/test_data_shards.py")
_FIELDS = ("test_fields.py",)  # defaults and bounds
_DECLARED = ("training/test_optimizer.py",)  # which parameters decay
_MIXERS = (
    "model/test_mixers.py",
    "training/test_mixers_training.py",
    *_FIELDS,
    *_DECLARED,
)
_RECURRENCE = (
    "model/test_recurrence.py",
    "training/test_recurrence_runs.py",
    *_FIELDS,
    *_DECLARED,
)
_LOOKUP = ("ops/test_hashing.py", "ops/test_lookup.py", "ops/test_lookup_native.py")

_TESTS = {
    "data/run_tokenizer": ("data/test_run_tokenizer.py",),
    "model/__init__": ("model/test_model.py",),
    "model/implementations": ("model/test_implementations.py",),
    "model/narrow": (
        "model/test_narrow.py",
        "ops/test_narrow_rows.py",
        "ops/test_scores.py",
    ),
    "model/params": (
        "model/test_model.py",
        "training/test_optimizer_lean.py",
        "evaluation/test_evaluation.py",
        "test_sharding.py",
    ),
    "model/stack": ("ops/test_remat.py", "model/test_model.py", *_FIELDS),
    "runs/steps": (
        "runs/test_checkpoint.py",
        "runs/test_ledger.py",
        "files/test_paths.py",
        "test_endings.py",
    ),
    "training/programs": (
        "training/test_loop.py",
        "training/test_compilations.py",
        "test_config.py",
        "test_sharding.py",
        "training/test_mixers_training.py",
        "model/test_implementations.py",
    ),
    "training/step": (
        "training/test_loop.py",
        "training/test_optimizer_lean.py",
        "test_sharding.py",
        "training/test_mixers_training.py",
    ),
    "runs/checkpoint": (
        "runs/test_checkpoint.py",
        "runs/test_ledger.py",
        "training/test_loop.py",
        *_FIELDS,
        "files/test_paths.py",
    ),
    "data/__init__": (
        *_DATA,
        "data/test_data_corpora.py",
        "data/test_data_tokenizer.py",
        "data/test_data_bytes.py",
        "data/test_run_tokenizer.py",
    ),
    "data/__main__": (
        "data/test_data_source.py",
        "data/test_data_corpora.py",
        "data/test_data_yardsticks.py",
    ),
    "data/blocks": ("data/test_local_files.py", "data/test_data_fuzz.py"),
    "data/tfds_catalogue": (
        "data/test_data_corpora.py",
        "data/test_data_documents.py",
    ),
    "data/corpora": ("data/test_data_corpora.py", *_FIELDS),
    "data/documents": (
        "data/test_data_documents.py",
        "data/test_data_corpora.py",
        *_DATA,
        "data/test_local_files.py",
        "data/test_data_bytes.py",
    ),
    "data/local_files": (
        "data/test_local_files.py",
        "data/test_data_corpora.py",
        "data/test_data_fuzz.py",
    ),
    "data/jsonlines": ("data/test_local_files.py", "data/test_data_fuzz.py"),
    "data/layout": ("data/test_data_layout.py", "data/test_data_source.py"),
    "data/listing": (
        "data/test_data_listing.py",
        "data/test_local_files.py",
        "data/test_data_corpora.py",
    ),
    "data/manifest": (
        "data/test_data_shards.py",
        "data/test_data_source.py",
        "data/test_data_bytes.py",
        "data/test_data_fuzz.py",
    ),
    "data/names": ("data/test_local_files.py", "data/test_data_corpora.py"),
    "data/options": (
        "data/test_data_shards.py",
        "data/test_data_source.py",
        "data/test_data_corpora.py",
        *_FIELDS,
        "data/test_data_bytes.py",
    ),
    "data/progress": ("data/test_data_documents.py", "data/test_data_shards.py"),
    "data/shards": (
        "data/test_data_shards.py",
        "data/test_data_source.py",
        "data/test_data_documents.py",
        "data/test_local_files.py",
        "data/test_data_bytes.py",
        "data/test_data_corpora.py",
    ),
    "data/source": ("data/test_data_source.py", "data/test_data_layout.py"),
    "data/tokenizer": (
        "data/test_data_tokenizer.py",
        "convert/test_convert_export.py",
        "data/test_data_documents.py",
        "data/test_data_fuzz.py",
        "data/test_data_bytes.py",
    ),
    "data/vocabulary": (
        "data/test_data_tokenizer.py",
        "data/test_data_bytes.py",
        "data/test_data_fuzz.py",
    ),
    "data/yardsticks": (
        "data/test_data_yardsticks.py",
        "data/test_data_bytes.py",
    ),
    "generation/sampler": (
        "generation/test_generation.py",
        "model/test_narrow.py",
        "training/test_mixers_training.py",
        "model/test_recurrence.py",
        *_FIELDS,
    ),
    "runs/compatibility": (
        "runs/test_compatibility.py",
        "data/test_run_tokenizer.py",
        "runs/test_checkpoint.py",
        "training/test_loop.py",
    ),
    "evaluation/loss": (
        "evaluation/test_evaluation.py",
        "training/test_loop.py",
        "test_sharding.py",
    ),
    "runs/manifest": (
        "runs/test_ledger.py",
        "runs/test_checkpoint.py",
        "training/test_loop.py",
        "files/test_paths.py",
    ),
    "model/layers": (
        "model/test_layers.py",
        "model/test_model.py",
        "test_sharding.py",
        *_DECLARED,
    ),
    "runs/state_spec": ("files/test_paths.py", "runs/test_checkpoint.py"),
    "model/losses": (
        "model/test_layers.py",
        "evaluation/test_evaluation.py",
        "test_sharding.py",
        "training/test_mixers_training.py",
    ),
    "model/mixers/__init__": (
        *_MIXERS,
        "model/test_mixers_performer.py",
        "model/test_model.py",
        "model/test_recurrence.py",
        "test_sharding.py",
        "evaluation/test_slots.py",
    ),
    "model/mixers/base": _MIXERS,
    "model/mixers/linformer": (
        "model/test_mixers.py",
        "evaluation/test_slots.py",
        "ops/test_ring.py",
        *_FIELDS,
        *_DECLARED,
    ),
    "model/mixers/dape": _MIXERS,
    "model/mixers/kernel": (
        "model/test_mixers_performer.py",
        "model/test_mixers.py",
        "training/test_mixers_training.py",
        "ops/test_ring.py",
        *_FIELDS,
        *_DECLARED,
    ),
    "model/mixers/softmax": (*_MIXERS, "ops/test_attention.py", "ops/test_ring.py"),
    "model/config": (
        "test_config.py",
        "model/test_model.py",
        "model/test_mixers.py",
        *_FIELDS,
    ),
    "model/transformer": (
        "model/test_model.py",
        "training/test_optimizer_lean.py",
        "model/test_model_chunks.py",
        "test_config.py",
        *_DECLARED,
        "model/test_mixers.py",
    ),
    "ops/attention": (
        "ops/test_attention.py",
        "model/test_implementations.py",
        "model/test_mixers.py",
        "ops/test_ring.py",
        "training/test_mixers_training.py",
    ),
    "ops/collectives": ("model/test_layers.py", "test_sharding.py", "ops/test_ring.py"),
    "ops/remat": ("ops/test_remat.py", "model/test_model.py"),
    "ops/hashing": (
        "ops/test_hashing.py",
        "ops/test_lookup.py",
        "model/test_layers.py",
        "ops/test_scores.py",
    ),
    "ops/lookup/__init__": (
        "ops/test_lookup.py",
        *_LOOKUP[2:],
        "ops/test_lookup_gpu.py",
        "ops/test_scores.py",
    ),
    "ops/lookup/gpu": (
        "ops/test_lookup_gpu.py",
        "ops/test_scores.py",
    ),
    "ops/lookup/native": (
        "ops/test_lookup_native.py",
        "ops/test_narrow_rows.py",
        "ops/test_scores.py",
        "model/test_implementations.py",
    ),
    "ops/lookup/xla": (
        "ops/test_lookup.py",
        "ops/test_lookup_native.py",
        "ops/test_scores.py",
    ),
    "ops/only_on": ("model/test_implementations.py", "ops/test_lookup.py"),
    "ops/lookup/narrow": (
        "ops/test_narrow_rows.py",
        "model/test_narrow.py",
        "ops/test_scores.py",
    ),
    "ops/prefix": ("ops/test_prefix.py", "model/test_mixers.py", "ops/test_ring.py"),
    "ops/random_features": (
        "ops/test_random_features.py",
        "model/test_mixers_performer.py",
        "model/test_mixers.py",
        "training/test_mixers_training.py",
    ),
    "ops/ring": ("ops/test_ring.py",),
    "ops/rotary": ("model/test_layers.py", "model/test_mixers.py"),
    "training/optimizer": (
        "training/test_optimizer.py",
        "training/test_optimizer_lean.py",
        "training/test_loop.py",
        *_FIELDS,
    ),
    "files/paths": ("files/test_paths.py",),
    "model/recurrence/__init__": _RECURRENCE,
    "model/recurrence/base": _RECURRENCE,
    "model/recurrence/memformer": _RECURRENCE,
    "model/recurrence/rmt": _RECURRENCE,
    "sharding": (
        "test_sharding_mesh.py",
        "test_sharding.py",
        "test_config.py",
        "evaluation/test_evaluation.py",
        "training/test_optimizer_lean.py",
    ),
    "training/spikes": (
        "training/test_spikes.py",
        "training/test_loop.py",
        "test_endings.py",
    ),
    "training/loop": (
        "training/test_loop.py",
        "test_sharding.py",
        "training/test_mixers_training.py",
        "test_endings.py",
        "training/test_compilations.py",
    ),
}
MODULES = {f"memoryformer/{name}.py": tests for name, tests in _TESTS.items()}


def paths(prefixes: tuple[str, ...] = ()) -> list[str]:
    """The modules whose name begins with one of `prefixes`; all for none."""
    wanted = tuple(f"memoryformer/{prefix}" for prefix in prefixes or ("",))
    return [path for path in MODULES if path.startswith(wanted)]
