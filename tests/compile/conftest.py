"""Settings that libtpu reads when it is loaded; it only compiles here."""

import os

# It would ask a cloud metadata server, for minutes, what machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# It locks a chip that is not there: a second test process would be refused.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
