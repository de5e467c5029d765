"""Text to tokens: what V3 does to its corpus before the first matrix product (report section 4.1), on any text you have.

The problem: a run should be a pure function of its config. Which text, which split, which tokens, which batch at step 1000:
all of it must come out the same on one rank or on many, today or after a crash. So nothing here remembers a position.

    documents --split--> train, val --tokenizer--> ids --FIM, boundary splits, packing--> one long stream --> batch(step)

  documents   The default corpus is the Python standard library on this machine: offline, about 12 MB, one file = one document.
              A hash of the NAME decides the side of the split, so adding a file never moves another one.
  tokenizer   Byte-level BPE, so that every text has an encoding. The pre-tokenizer is in the spirit of V3's: a token may join
              punctuation and line breaks (");\\n"), one punctuation mark may lead a word (".append"), digits go by threes.
              V3 has 128K tokens; --tokenizer=bpe trains config.vocab_size of them here in seconds.
  FIM         A tenth of the documents is rearranged as prefix, suffix, middle (PSM), so that predicting the next token
              teaches filling a hole: <|fim_begin|> pre <|fim_hole|> suf <|fim_end|> mid <|eos_token|>.
  boundaries  A token like ":\\n" hides the place between ":" and the line break. A prompt that ends in ":" is then a text the
              model has never seen (token boundary bias), so V3 splits some of these tokens at random, and so do we.
  packing     Documents follow each other, each closed by eos, and sequences are cut from that stream. Attention crosses
              document borders: V3 masks nothing in pre-training.

Shapes: B sequences, T = seq_len tokens. A sequence is T+1+n_mtp tokens long: T inputs, the target of the last one, and what
MTP depth k sees further ahead (section 2.2). Ids are int64 in a batch, uint16 or uint32 on disk.

Simplified: the corpus fits in memory, quality filtering and deduplication are left to whoever made it (only the families
named below are kept on one side), and one tokenizer is trained on the text it will see.
"""
import difflib
import hashlib
import http.client
import json
import lzma
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush, heapreplace
from pathlib import Path

import numpy as np
import regex                                                                            # comes with tiktoken; knows \p{L}
import tiktoken
import torch

from configs import Config, UserError
