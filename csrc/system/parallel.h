// parallel_for: one loop spread over a small pool of threads.
//
//     batchnorm::parallel_for(blocks, [&](int block) { add_up(block, sums + block * channels); });
//
// Each task is run exactly once, by the calling thread or by a worker. The tasks are dealt out in
// as many equal shares as there are threads: each works on its own share, one task at a time, and
// then on what is left of the others'. So a few more tasks than threads even out unequal ones, and
// calls that follow each other over the same memory find most of it in the caches of the same
// processor. A task may ask for its thread's seat, below the number of threads and no other
// thread's in this call: memory that the caller has allocated for each thread is found by it.
// Everything the tasks wrote is visible to the caller when parallel_for returns. Handing work to a
// worker that is awake costs about a microsecond, to one that sleeps some tens: a loop shorter than
// 50 to 100 microseconds is better left serial.
//
// How it works. A call is a job on the caller's stack: a counter of the next task for each share,
// and a few seats for workers. The job is put on the pool's list; workers that find a free seat
// there take it, and they and the caller draw tasks from the counters until none is left. Then the
// caller takes the job off the list and waits for the workers that hold a seat, each of which is in
// the middle of its last task. It never waits for a worker that has not come: where all of them are
// busy or slow to wake, the caller has simply done the work itself. Hence
//
//   - it may be called from any thread, from many at once (Python threads, XLA's own pool), and
//     from inside a task: no call ever waits for a thread that could be waiting for it;
//   - it does not allocate, apart from starting the workers on first need.
//
// Waiting. A worker without work, and a caller waiting for workers, look again and again for a few
// microseconds, go on looking for some tens more while they yield the core to whoever else wants
// it, and then sleep. Calls in close succession thus find the workers awake, and a crowded machine
// loses little.
//
// fork(). The child has none of its parent's workers and perhaps a locked mutex, so it starts with
// a new, empty pool; the parent's goes on undisturbed. The one thing that cannot work is a task
// that forks and lets the child return. Nothing else here, or in the stages, holds a lock that a
// child could inherit: there are no static variables of functions, whose guards are locks.
//
// Exit. Workers are detached and the pool is never destroyed: a process may end while they sleep,
// look or work.
//
// Teams. A program around us may have threads of its own for its loops, in an OpenMP runtime, that
// go on looking for work for milliseconds after each loop, on the CPUs that a second pool would
// need. A call that is given the way into that runtime runs its tasks on those threads: on as many
// as are its setting, up to those that the call may use. OpenMP's threads are not there in the
// child of a fork, whose loops would wait for them for ever; there the pool serves. Such a call,
// unlike the pool's, waits for all threads of the team, which has a barrier at its end. How many
// threads its user wants is asked at every call, and holds in the child of a fork, too.
//
// Workers handle no signals, except those that report a fault of their own. A task computes in the
// caller's floating-point environment (rounding, flushing of denormals) whichever thread runs it.

#pragma once

namespace batchnorm {

struct OpenMp {
  // The runtime's GOMP_parallel(function, argument, threads, flags), to which compilers translate a
  // parallel region: every thread of the team calls function(argument). 0 threads: as many as are
  // set.
  void (*start)(void (*)(void*), void*, unsigned, unsigned);
  // How many threads a loop of the calling thread may have; null where nobody says.
  int (*threads)();
  // The runtime's omp_get_thread_num(): which thread of the team the calling one is.
  int (*number)();
};
using Team = const OpenMp*;

// Whether a thread begins with the first task of its share, or with the last.
enum class Order { upwards, downwards };

namespace detail {
using Run = void (*)(const void* body, int task, int seat);
void parallel_for(int tasks, int threads, Run run, const void* body, Team team, Order order);
}  // namespace detail

// How many threads one call may use, the caller included; available_cpus() until it is set.
int num_threads();

// No more than the team says.
int num_threads(Team team);

// Runs body(task, seat) for every task in [0, tasks), on up to `threads` threads of `team` or,
// where it is null, of the pool; returns when all are done. It must not throw.
template <typename Body>
void parallel_for(int tasks, int threads, const Body& body, Team team = nullptr,
                  Order order = Order::upwards) {
  const auto run = [](const void* object, int task, int seat) {
    (*static_cast<const Body*>(object))(task, seat);
  };
  detail::parallel_for(tasks, threads, run, &body, team, order);
}

// The same with body(task), on up to num_threads(team) threads.
template <typename Body>
void parallel_for(int tasks, const Body& body, Team team = nullptr) {
  parallel_for(tasks, num_threads(team), [&](int task, int) { body(task); }, team);
}

// For later calls, in all threads; n >= 1. Workers that are no longer wanted stay asleep.
void set_num_threads(int n);

// How many CPUs this process may use: those its affinity mask allows (on Linux the calling
// thread's, which is what new threads inherit), or fewer where a cgroup limits its CPU time; at
// least 1. Reads no environment variable.
int available_cpus();

}  // namespace batchnorm
