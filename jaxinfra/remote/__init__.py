"""A run folder in an object store: `--run.dir s3://bucket/run`, or gs://.

The same files under the same names as in a run folder on disk, so that either can be
copied to the other and go on there. What differs is what an object store has not:

| on disk | here |
|---|---|
| a save is committed by a rename | by creating `manifest.json`, which only one can |
| metrics.jsonl, events.jsonl grow | `metrics.00000001.jsonl`, ...: one part a save |
| owner records, aged by their mtime | watched: one that is renewed is of a live run |

| file | subject |
|---|---|
| `object_path` | a key that reads, writes, creates, lists and deletes as a path does |
| `commits` | folders of steps: begun, committed, fenced off, deleted |
| `lines` | JSON lines in parts, and taking back those of steps that were undone |
| `ownership` | one run folder, one live run |

Through TensorStore's key-value stores, which the core has; credentials and endpoints
are where the usual tools look for them: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_REGION
or a profile; GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST. An outage is waited
for as `data.patience` says. Loaded by public names, where a run folder is a URL.
"""
