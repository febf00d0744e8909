/* Written by `make format` from `schema.py`: what DATA holds. Comments only; not in the page. */

/**
 * Points of a line, and the ends of their 95 % intervals where they have any.
 * @typedef {object} Line
 * @property {Array<number|null>} x
 * @property {Array<number|null>} y
 * @property {Array<number|null>} [lo]
 * @property {Array<number|null>} [hi]
 */

/**
 * Logged losses over steps, held out and on training batches.
 * @typedef {object} Losses
 * @property {Line} eval
 * @property {Line} train
 */

/**
 * Values of layers: one row per step, one column per scope (a position in `Payload.scopes`).
 * @typedef {object} Layers
 * @property {Array<number>} steps
 * @property {Array<number>} scopes
 * @property {Array<Array<number|null>>} values
 * @property {Array<Array<number|null>>} [lo]
 * @property {Array<Array<number|null>>} [hi]
 * @property {Array<number>} [runs]
 */

/**
 * A metric over steps; `why` it has no value, the run `base` it compares with, its layers; `own`: not dense.
 * @typedef {object} Trend
 * @property {Array<number|null>} x
 * @property {Array<number|null>} y
 * @property {Array<number|null>} [lo]
 * @property {Array<number|null>} [hi]
 * @property {string|null} why
 * @property {string|null} base
 * @property {number} [own]
 * @property {Layers} [layers]
 */

/**
 * Loss along a line; the rise is above `center + slope · t`, with a band in means over runs; `own`: not dense.
 * @typedef {object} Curve
 * @property {number} step
 * @property {Array<number|null>} t
 * @property {Array<number|null>} y
 * @property {number|null} center
 * @property {number|null} [slope]
 * @property {Array<number|null>} [lo]
 * @property {Array<number|null>} [hi]
 * @property {Array<number|null>} [rise_lo]
 * @property {Array<number|null>} [rise_hi]
 * @property {number} [relative]
 * @property {number} [own]
 * @property {string} [base]
 */

/**
 * Loss at (x[j], y[i]); `own`: not of dense weights.
 * @typedef {object} Plane
 * @property {number} step
 * @property {number} [own]
 * @property {Array<number|null>} x
 * @property {Array<number|null>} y
 * @property {Array<Array<number|null>>} loss
 */

/**
 * Loss and mean above-chance score at the steps that have both.
 * @typedef {object} Scores
 * @property {Array<number|null>} x
 * @property {Array<number|null>} y
 * @property {Array<number>} step
 */

/**
 * A mean over `n` runs with its 95 % interval.
 * @typedef {object} Mean
 * @property {number|null} mean
 * @property {number|null} lo
 * @property {number|null} hi
 * @property {number} n
 */

/**
 * One run; `final` by quantity, `tasks` by task as [value, low, high, step].
 * @typedef {object} Run
 * @property {string} name
 * @property {number} method
 * @property {number|null} seed
 * @property {number} group
 * @property {Object<string, number|null>} final
 * @property {number|null} unigram
 * @property {Losses} loss
 * @property {Object<string, Trend>} metrics
 * @property {Object<string, Array<Curve>>} curves
 * @property {Plane|null} plane
 * @property {Scores} above
 * @property {Object<string, Array<number|null>>} tasks
 */

/**
 * Means over the runs of one method in one group; only for methods with several runs there.
 * @typedef {object} MethodMeans
 * @property {number} method
 * @property {number} group
 * @property {Object<string, Mean>} final
 * @property {Losses} loss
 * @property {Object<string, Trend>} metrics
 * @property {Object<string, Array<Curve>>} curves
 * @property {Object<string, Mean>} tasks
 */

/**
 * Mean barrier between two methods: positions in `Payload.methods`, or the name of a run that is not shown.
 * @typedef {object} Barrier
 * @property {number} group
 * @property {number|string} row
 * @property {number|string} column
 * @property {number|null} value
 */

/**
 * How a method is named and drawn.
 * @typedef {object} MethodLook
 * @property {string} name
 * @property {string} title
 * @property {Array<number>} dash
 * @property {string} marker
 */

/**
 * A downstream task and one of its metrics.
 * @typedef {object} Task
 * @property {string} id
 * @property {string} task
 * @property {string} metric
 * @property {number|null} chance
 * @property {boolean} higher
 */

/**
 * One run of the sweep; `varied`: other keys than the learning rate were swept too.
 * @typedef {object} Trial
 * @property {number} method
 * @property {number|null} rate
 * @property {number|null} loss
 * @property {boolean} chosen
 * @property {boolean} edge
 * @property {boolean} varied
 */

/**
 * Observed and predicted downstream scores, with [run, step] of each, for one question.
 * @typedef {object} Prediction
 * @property {string} question
 * @property {Array<number|null>} observed
 * @property {Array<number|null>} predicted_perplexity
 * @property {Array<number|null>} predicted_both
 * @property {Array<Array<*>>} rows
 */

/**
 * What methods can be compared by; `dimension` is the title of its section.
 * @typedef {object} Quantity
 * @property {string} title
 * @property {string} unit
 * @property {string} help
 * @property {string} dimension
 */

/**
 * How a metric is described.
 * @typedef {object} MetricText
 * @property {string} title
 * @property {string} short
 * @property {string} unit
 * @property {string} dimension
 * @property {string} meaning
 */

/**
 * Everything that the pictures draw. A method is referred to by its position in `methods`.
 * @typedef {object} Payload
 * @property {Array<MethodLook>} methods
 * @property {Array<Run>} runs
 * @property {Array<MethodMeans>} means
 * @property {Array<Barrier>} barriers
 * @property {Array<string>} scopes
 * @property {Array<Task>} tasks
 * @property {Array<Trial>} sweep
 * @property {Array<Prediction>} predictions
 * @property {Array<Array<*>>} claims
 * @property {Object<string, Array<number|null>>} heats
 * @property {Object<string, Quantity>} quantities
 * @property {Object<string, string>} dimensions
 * @property {Object<string, MetricText>} metrics
 */
