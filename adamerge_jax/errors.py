"""The one error that means: the input is wrong, not the program."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file, the tensor or the field, says what was found and
    what was expected, and what to do about it. The command line prints it without a traceback
    and exits with status 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import InputError, task_vectors
        >>> try:
        ...     task_vectors({"kernel": jnp.ones((2, 3))}, [{"kernel": jnp.ones((2, 4))}])
        ... except InputError as error:
        ...     print(error)
        expert 0: parameter 'kernel' has shape (2, 4), the base has (2, 3)
    """
