//! Calls that a file system which hangs may block, in threads of their own.

use std::io;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// A call that runs.
#[derive(Debug)]
pub(crate) struct Call<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    returned: Condvar,
}

#[derive(Debug)]
enum State<T> {
    Runs,
    Returned(T),
    /// Nobody waits for it any more.
    Abandoned,
}

impl<T: Send + 'static> Call<T> {
    /// Starts a call. `late` receives its result, in the same thread, if nobody waits for it any more.
    pub(crate) fn start(
        call: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::new(State::Runs), returned: Condvar::new() });
        let own = shared.clone();
        let run = move || {
            let result = call();
            let mut state = own.state.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(*state, State::Abandoned) {
                drop(state);
                return late(result);
            }
            *state = State::Returned(result);
            own.returned.notify_all();
        };
        thread::Builder::new().name("blocking".into()).spawn(run)?;
        Ok(Call(shared))
    }

    /// The result, if there is one by the deadline.
    pub(crate) fn until(self, deadline: Instant) -> Option<T> {
        let state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let longest = deadline.saturating_duration_since(Instant::now());
        let waited = self.0.returned.wait_timeout_while(state, longest, |state| matches!(state, State::Runs));
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match mem::replace(&mut *state, State::Abandoned) {
            State::Returned(result) => Some(result),
            State::Runs | State::Abandoned => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn late_result_goes_to_its_own_thread() {
        let (go, wait) = mpsc::channel::<u32>();
        let (late, came) = mpsc::channel();
        let blocked = Call::start(move || wait.recv().unwrap(), move |it| late.send(it).unwrap()).unwrap();
        assert_eq!(blocked.until(Instant::now() + Duration::from_millis(10)), None);
        go.send(7).unwrap();
        assert_eq!(came.recv_timeout(Duration::from_secs(60)), Ok(7));
    }

    #[test]
    fn result_in_time_is_returned() {
        let call = Call::start(|| 7, |_| panic!("it is not late")).unwrap();
        assert_eq!(call.until(Instant::now() + Duration::from_secs(60)), Some(7));
    }
}
