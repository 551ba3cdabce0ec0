"""Every error that seqmill raises on purpose.

SeqmillError
├── UserError             something you wrote is wrong; exit code 2
│   ├── RecipeError       a recipe, spec or override cannot be used as it stands
│   ├── SettingsError     a setting of this machine, or a DeepSpeed file, cannot be used
│   └── RefError          a reference names no artifact in the store, or more than one
└── WorldError            the recipe is fine, the world is not; exit code 1
    ├── SourceError       published bytes cannot be had, or are not the expected ones
    ├── CorpusError       the corpus, a conversation or a tokenizer is not what the stage can work on
    ├── StoreError        the store cannot be read or written, or an artifact in it is damaged
    ├── DiskSpaceError    there is less room than the work needs
    ├── WorkerError       a process started for the work failed; carries its last lines
    ├── GateError         a model misses the bounds that its recipe states
    └── StoppedError      the work was told to stop (SIGTERM) and is kept: the same again goes on; exit code 143

The message is one line: ``<where>: <what was found>; <what to do>``, lower case, no full stop.
"""


class SeqmillError(Exception):
    """Base of all below: catch this to catch what seqmill raises on purpose."""

    exit_code = 1


class UserError(SeqmillError):
    """Something the user wrote is wrong."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, a spec or an override cannot be used as it stands."""


class SettingsError(UserError):
    """A setting of this machine, or a DeepSpeed file, cannot be used."""


class RefError(UserError):
    """A reference names no artifact in the store, or more than one."""


class WorldError(SeqmillError):
    """The recipe is fine, the world is not."""


class SourceError(WorldError):
    """Published bytes cannot be had, or are not the expected ones."""


class CorpusError(WorldError):
    """The corpus, a conversation or a tokenizer is not what the stage can work on."""


class StoreError(WorldError):
    """The store cannot be read or written, or an artifact in it is damaged."""


class DiskSpaceError(WorldError):
    """There is less room than the work needs."""


class WorkerError(WorldError):
    """A process started for the work failed."""


class GateError(WorldError):
    """A model misses the bounds that its recipe states."""


class StoppedError(WorldError):
    """The work was told to stop and is kept: the same again goes on."""

    exit_code = 143  # 128 + SIGTERM, as a shell says it
