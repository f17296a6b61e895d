#include "system/parallel.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "system/file.h"

namespace batchnorm {
namespace {

// A thread that waits looks without a break for the first time, and up to the second while it
// yields the core between looks; then it sleeps.
constexpr auto kPauseTime = std::chrono::microseconds(5);
constexpr auto kYieldTime = std::chrono::microseconds(50);

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  asm volatile("isb");  // "yield" does nothing on most cores
#endif
}

// Looks until ready() or until the time is over, and says which.
template <typename Ready>
bool spin(const Ready& ready) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    for (int look = 0; look < 16; ++look) {
      if (ready()) return true;
      relax();
    }
    const auto waited = std::chrono::steady_clock::now() - start;
    if (waited > kYieldTime) return false;
    if (waited > kPauseTime) std::this_thread::yield();
  }
}

// Threads beyond this number share a share with one before.
constexpr int kMostShares = 64;

// One call of parallel_for, on the stack of its caller.
struct Job {
  Job(int tasks, int threads, detail::Run run, const void* body, Order order)
      : run(run), body(body), order(order), tasks(tasks), shares(std::min(threads, kMostShares)) {
    std::fegetenv(&environment);
  }

  const detail::Run run;
  const void* const body;
  const Order order;
  const int tasks, shares;
  std::fenv_t environment;

  // Guarded by the pool's mutex: how many more workers may join, and the pool's list, where a job
  // stands while it has free seats.
  int free_seats = 0;
  Job* next_job = nullptr;

  std::atomic<int> helpers{0};  // workers that hold a seat

  // How many tasks of each share are taken. Every thread overshoots once: with 64 bits it cannot
  // wrap.
  struct alignas(64) Counter {
    std::atomic<std::int64_t> value{0};
  };
  Counter taken[kMostShares];

  int begin_of(int share) const {
    return static_cast<int>(static_cast<std::int64_t>(tasks) * share / shares);
  }
  int size_of(int share) const { return begin_of(share + 1) - begin_of(share); }

  void work(int seat) {
    for (int turn = 0; turn < shares; ++turn) {
      const int share = (seat + turn) % shares, size = size_of(share);
      for (std::int64_t i;
           (i = taken[share].value.fetch_add(1, std::memory_order_relaxed)) < size;) {
        const int place = static_cast<int>(order == Order::upwards ? i : size - 1 - i);
        run(body, begin_of(share) + place, seat);
      }
    }
  }

  bool exhausted() const {
    for (int share = 0; share < shares; ++share) {
      if (taken[share].value.load(std::memory_order_relaxed) < size_of(share)) return false;
    }
    return true;
  }
};

class Pool {
 public:
  void offer(Job& job, int seats) {
    int wanted, asleep;
    {
      std::lock_guard<std::mutex> lock(mutex);
      while (workers < seats && start_worker()) {
      }
      job.free_seats = seats;
      job.next_job = jobs;
      jobs = &job;
      free_seats += seats;
      wanted = seats - spinning;
      asleep = sleeping;
    }
    if (wanted >= asleep) {
      work_offered.notify_all();
    } else {
      for (; wanted > 0; --wanted) work_offered.notify_one();
    }
  }

  // Nobody joins any more; returns when those who had joined are done.
  void withdraw(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      unlist(job);
    }
    if (spin([&] { return job.helpers == 0; })) return;
    std::unique_lock<std::mutex> lock(mutex);
    ++sleeping_callers;
    helpers_left.wait(lock, [&] { return job.helpers == 0; });
    --sleeping_callers;
  }

 private:
  bool start_worker() {
#ifndef _WIN32
    // The new thread inherits the mask. Faults are left out for the sake of Python's faulthandler.
    sigset_t blocked, previous;
    sigfillset(&blocked);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_BLOCK, &blocked, &previous);
#endif
    bool started = true;
    try {
      std::thread([this] { serve(); }).detach();
      ++workers;
    } catch (const std::exception&) {  // the system has no thread to give: fewer will do
      started = false;
    }
#ifndef _WIN32
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
#endif
    return started;
  }

  [[noreturn]] void serve() {
    ++spinning;
    for (;;) {
      const Seat taken = next_seat();
      Job& job = *taken.job;
      std::fesetenv(&job.environment);
      job.work(taken.number);
      // Before leaving, so that the caller's next offer counts on this worker and wakes no other.
      ++spinning;
      const bool last = --job.helpers == 0;  // from here on the job may be gone
      if (last && sleeping_callers > 0) {
        // Under the mutex no caller is between its last look and its sleep.
        std::lock_guard<std::mutex> lock(mutex);
        helpers_left.notify_all();
      }
    }
  }

  struct Seat {
    Job* job;  // null where there is none
    int number;
  };

  Seat next_seat() {
    Seat seat = {};
    spin([&] {
      if (free_seats == 0) return false;
      // A crowd of workers must not queue up here, in the way of the callers.
      std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
      if (lock) seat = take_seat();
      return seat.job != nullptr;
    });
    --spinning;
    if (seat.job) return seat;
    std::unique_lock<std::mutex> lock(mutex);
    while (!(seat = take_seat()).job) {
      ++sleeping;
      work_offered.wait(lock);
      --sleeping;
    }
    return seat;
  }

  // The caller's is 0.
  Seat take_seat() {
    while (jobs && jobs->exhausted()) unlist(*jobs);
    Job* job = jobs;
    if (!job) return {};
    ++job->helpers;
    --free_seats;
    const int number = job->free_seats--;
    if (job->free_seats == 0) jobs = job->next_job;
    return {job, number};
  }

  void unlist(Job& job) {
    if (job.free_seats == 0) return;  // not in the list
    Job** link = &jobs;
    while (*link != &job) link = &(*link)->next_job;
    *link = job.next_job;
    free_seats -= job.free_seats;
    job.free_seats = 0;
  }

  std::mutex mutex;
  std::condition_variable work_offered;  // for workers
  std::condition_variable helpers_left;  // for callers
  Job* jobs = nullptr;                   // the newest first
  int workers = 0;
  int sleeping = 0;
  std::atomic<int> sleeping_callers{0};
  std::atomic<int> spinning{0};

  // Of all jobs in the list; what spinning workers look at.
  alignas(64) std::atomic<int> free_seats{0};
};

// Never destroyed: at exit workers may still wait on the condition variables.
alignas(Pool) unsigned char pool_memory[sizeof(Pool)];
Pool& pool = *new (pool_memory) Pool;

bool forked = false;  // this process is the child of a fork

#ifndef _WIN32
// Allocates nothing and locks nothing, as threads that are no more may have held any lock.
void start_anew() {
  new (pool_memory) Pool;
  forked = true;
}
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, start_anew);
#endif

// A job on the first `seats` threads of a team.
class TeamJob {
 public:
  TeamJob(Job& job, int seats, Team team) : job_(job), seats_(seats), team_(team) {}

  void run() {
    team_->start([](void* self) { static_cast<TeamJob*>(self)->join(); }, this, 0, 0);
  }

 private:
  void join() {
    const int seat = team_->number();
    if (seat >= seats_) return;
    std::fenv_t own;  // the thread is not ours
    std::fegetenv(&own);
    std::fesetenv(&job_.environment);
    job_.work(seat);
    std::fesetenv(&own);
  }

  Job& job_;
  const int seats_;
  const Team team_;
};

std::atomic<int> thread_limit{0};  // 0: nobody has asked yet

#ifdef __linux__

int affinity_cpus() {
  // The kernel refuses a mask shorter than its own.
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* mask = CPU_ALLOC(cpus);
    if (!mask) break;
    const std::size_t size = CPU_ALLOC_SIZE(cpus);
    const int count = sched_getaffinity(0, size, mask) == 0 ? CPU_COUNT_S(size, mask) : 0;
    CPU_FREE(mask);
    if (count > 0) return count;
  }
  return static_cast<int>(std::thread::hardware_concurrency());
}

// The quota that one cgroup sets, in CPUs; infinity where it sets none: without one, version 2 says
// "max" and version 1 says -1.
double quota_cpus(const std::string& directory, bool version2) {
  std::string quota, period;
  if (version2) {
    quota = contents_of(directory + "/cpu.max");
    period = quota.substr(std::min(quota.find(' '), quota.size()));
  } else {
    quota = contents_of(directory + "/cpu.cfs_quota_us");
    period = contents_of(directory + "/cpu.cfs_period_us");
  }
  const double cpus = std::atof(quota.c_str()) / std::atof(period.c_str());
  return cpus > 0 ? cpus : HUGE_VAL;
}

// The smallest quota among this process's cgroup and those above it. In a container the path is
// often the host's and not there; the walk up then ends at the container's own root, which is.
double cgroup_cpus() {
  double cpus = HUGE_VAL;
  const std::string cgroups = contents_of("/proc/self/cgroup");
  for (std::size_t start = 0, end; start < cgroups.size(); start = end + 1) {
    end = std::min(cgroups.find('\n', start), cgroups.size());
    const std::string line = cgroups.substr(start, end - start);  // number:controllers:/path
    const std::size_t first = line.find(':'), second = line.find(":/", first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool version2 = controllers == ",,";
    if (!version2 && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string root = version2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    std::string path = line.substr(second + 1);
    cpus = std::min(cpus, quota_cpus(root + path, version2));
    while (!path.empty()) {
      path.erase(path.rfind('/'));
      cpus = std::min(cpus, quota_cpus(root + path, version2));
    }
  }
  return cpus;
}

#endif

}  // namespace

void detail::parallel_for(int tasks, int threads, Run run, const void* body, Team team,
                          Order order) {
  threads = std::min(tasks, threads);
  if (threads <= 1) {
    for (int i = 0; i < tasks; ++i) run(body, order == Order::upwards ? i : tasks - 1 - i, 0);
    return;
  }
  Job job(tasks, threads, run, body, order);
  if (team && !forked) return TeamJob(job, threads, team).run();
  pool.offer(job, threads - 1);
  job.work(0);
  pool.withdraw(job);
}

int num_threads() {
  const int limit = thread_limit;
  if (limit > 0) return limit;
  int unset = 0;
  thread_limit.compare_exchange_strong(unset, available_cpus());
  return thread_limit;
}

int num_threads(Team team) {
  const int threads = num_threads();
  return team && team->threads ? std::clamp(team->threads(), 1, threads) : threads;
}

void set_num_threads(int n) { thread_limit = n; }

int available_cpus() {
#ifdef __linux__
  const double cpus = std::min<double>(affinity_cpus(), std::ceil(cgroup_cpus()));
#else
  const double cpus = std::thread::hardware_concurrency();
#endif
  return std::max(1, static_cast<int>(cpus));
}

}  // namespace batchnorm
