"""Scores of documents by models, without generation: rubrics, classes, rewards, and students distilled from them.

- `questions`: what a model is asked about a document, and the answers that it may give.
- `prompt`: a document and its questions as token ids. Long documents are cut in the middle.
- `rows`: packs documents with their questions into rows of one length. Documents do not see one another.
- `model`: runs rows on a mesh and reads the answers' probabilities.
- `student`: a small model over hashed n-grams that learns the scores of a large one.
- `operators`: both as operators of a curation, batch in, columns out.
- `job`: `qwen-jax data score`: all shards of a corpus, resumable, on one or several hosts.
"""
