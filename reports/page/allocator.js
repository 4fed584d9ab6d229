// What PyTorch's caching allocator would reserve on a GPU, as membench/memory/allocator.py says, where the rules are; and
// the traces that it serves, as membench/planning/traces.py packs them.

const UNIT = 512, MANY = 2 ** 20 / UNIT; // sizes and addresses are in units; a request of more than so many is large
const SMALL_SEGMENT = 2 * MANY, LARGE_SEGMENT = 20 * MANY, OWN_SEGMENT = 10 * MANY, ROUND_SEGMENT = 2 * MANY;

class CachingAllocator { // a block knows its neighbours in its segment; pools are its free blocks, sorted
  constructor(room = Infinity) { Object.assign(this, {reserved: 0, room, small: [], large: [], end: 0}); }

  allocate(size) { // a block of so many bytes; null if the GPU has no room for it
    const units = Math.ceil(size / UNIT) || 1, pool = units <= MANY ? this.small : this.large, place = placeIn(pool, units, -1);
    const block = place < pool.length ? pool.splice(place, 1)[0] : this.reserve(units, pool);
    if (!block) return null;
    const rest = block.units - units;
    if (rest > (pool === this.small ? 0 : MANY)) {
      const after = {pool, address: block.address + units, units: rest, free: true, before: block, after: block.after};
      if (after.after) after.after.before = after;
      Object.assign(block, {units, after});
      insert(after);
    }
    block.free = false;
    return block;
  }

  reserve(needed, pool) { // a segment as one block
    const units = needed <= MANY ? SMALL_SEGMENT : needed < OWN_SEGMENT ? LARGE_SEGMENT : Math.ceil(needed / ROUND_SEGMENT) * ROUND_SEGMENT;
    if (this.reserved + units * UNIT > this.room) {
      this.give_back('small');
      this.give_back('large');
      if (this.reserved + units * UNIT > this.room) return null;
    }
    this.reserved += units * UNIT;
    this.end += units;
    return {pool, address: this.end - units, units, free: false, before: null, after: null};
  }

  give_back(name) { // the segments of which nothing is used
    const pool = this[name], kept = pool.filter(block => block.before || block.after);
    this.reserved -= UNIT * pool.reduce((units, block) => units + (block.before || block.after ? 0 : block.units), 0);
    pool.splice(0, pool.length, ...kept);
  }

  release(block) { // it is merged with its free neighbours
    const {before, after} = block;
    if (after?.free) join(block, after, after);
    if (before?.free) join(before, block, before);
    const whole = before?.free ? before : block;
    whole.free = true;
    insert(whole);
  }
}

function placeIn(pool, units, address) { // where the first block is that is as large, or equal and as far
  let low = 0, high = pool.length;
  while (low < high) {
    const middle = (low + high) >> 1, block = pool[middle];
    if (block.units < units || block.units === units && block.address < address) low = middle + 1;
    else high = middle;
  }
  return low;
}

const insert = block => block.pool.splice(placeIn(block.pool, block.units, block.address), 0, block);

function join(block, next, free) { // two neighbours into the first; the one that is free leaves its pool
  free.pool.splice(placeIn(free.pool, free.units, free.address), 1);
  block.units += next.units;
  block.after = next.after;
  if (next.after) next.after.before = block;
}

// What serving a trace takes: bytes that are reserved in the end; null if a GPU with so much room can't. `sizes` are by
// kind of allocation, null for those that aren't made.
function serve({events, kinds}, sizes, room) {
  const allocator = new CachingAllocator(room), blocks = new Array(kinds.length);
  for (const event of events) {
    if (event >= 0) {
      const size = sizes[kinds[event]];
      if (size !== null && !(blocks[event] = allocator.allocate(size))) return null;
    } else if (blocks[~event]) {
      allocator.release(blocks[~event]);
      blocks[~event] = undefined;
    }
  }
  return allocator.reserved;
}

async function unpack(packed) { // a table's traces, and the polynomials of its kinds of allocations
  const bytes = Uint8Array.from(atob(packed), sign => sign.charCodeAt(0));
  const {kinds, frees, lengths, steps: read} = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))).json();
  const steps = new Int32Array(lengths.reduce((x, y) => x + y, 0));
  let end = 0;
  for (let i = 0; i < read.length; i++) {
    if (read[i] >= 0) steps[end++] = read[i];
    else for (let left = -read[i], back = read[++i]; left; left--, end++) steps[end] = steps[end - back];
  }
  end = 0;
  return {kinds, traces: lengths.map(length => traced(steps.subarray(end, end += length), frees))};
}

function traced(steps, frees) { // `i` where allocation `i` is made, `~i` where it is freed; and the kind of each
  const events = new Int32Array(steps.length), kinds = [], left = []; // by kind
  steps.forEach((step, place) => {
    if (step & 1) {
      const [kind, newer] = frees[step >> 1];
      events[place] = ~left[kind].splice(-1 - newer, 1)[0];
    } else {
      (left[step >> 1] ??= []).push(kinds.length);
      events[place] = kinds.push(step >> 1) - 1;
    }
  });
  return {events, kinds};
}
