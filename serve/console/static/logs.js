// The columns of a run's log, fetched by the byte from which on they are not known yet.
import { get } from "./common.js";

export class Log {
  constructor(run) {
    this.run = run;
    this.clear();
  }

  clear() {
    this.offset = 0;
    this.identity = "";
    this.columns = null;
  }

  /** Fetch what is new; whether there was any. */
  async grow() {
    let grown = false;
    for (;;) {
      const { run, offset, identity } = this;
      const found = await get("/console/api/log", { run, offset, identity });
      if (found.restart) this.clear();
      const many = found.columns.step.length;
      if (many || found.restart) grown = true;
      if (!this.columns) this.columns = found.columns;
      else for (const [key, values] of Object.entries(found.columns)) for (const value of values) this.columns[key].push(value);
      this.offset = found.offset;
      this.identity = found.identity;
      if (!found.more) return grown;
    }
  }

  /** The places where a column has a value: [steps, values], ascending; of one step the last value counts. */
  points(name) {
    const places = new Map();
    const steps = this.columns?.step ?? [];
    const values = this.columns?.[name] ?? [];
    for (let i = 0; i < steps.length; i += 1) if (values[i] !== null) places.set(steps[i], values[i]);
    const ascending = [...places.entries()].sort((a, b) => a[0] - b[0]);
    return [ascending.map(([step]) => step), ascending.map(([, value]) => value)];
  }
}

/** Exponential moving average with the bias of its beginning taken out, as TensorBoard smooths. */
export function smoothed(values, weight) {
  if (!weight) return values;
  let last = 0;
  let share = 1;
  return values.map((value) => {
    last = last * weight + (1 - weight) * value;
    share *= weight;
    return last / (1 - share);
  });
}
