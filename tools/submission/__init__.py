"""From five runs to a package for MLPerf Training: `python -m tools.submission COMMAND`, from the checkout.

| code | name        | meaning                                                                              |
|------|-------------|--------------------------------------------------------------------------------------|
| 0    | OK          | checked by everything that was to check it, and accepted                             |
| 1    |             | an unexpected error of this program; the traceback stands on stderr                  |
| 2    |             | a mistake in options or files: one line on stderr                                    |
| 3    | REFUSED     | checked, and it breaks a rule                                                        |
| 4    | DOUBTFUL    | the official checks accept it, but there are questions that a reviewer will ask      |
| 7    | NOT_CHECKED | a check did not run to its end, so that nothing is known; never to be read as 0      |
"""

OK = 0
REFUSED = 3
DOUBTFUL = 4
NOT_CHECKED = 7
