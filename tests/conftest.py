"""Under pytest nobody parses absl's flags, which `create_tempdir` reads."""

from absl import flags

flags.FLAGS.mark_as_parsed()
