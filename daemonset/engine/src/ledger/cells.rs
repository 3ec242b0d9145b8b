//! Room for names: cells of a few sizes, each page holding one size.
//!
//! A cell is free when its first word is zero. Which cells are free is not written down anywhere else: an engine
//! begins with new pages and finds the free cells of old ones by looking, a few at a time.

use super::change::Change;
use super::layout::{Geometry, PAGE, header};

/// Words of the smallest cell, and by how much the next is larger.
const UNIT: u32 = 2;

/// Cells of all sizes are numbered by the unit at which they begin.
const UNITS_PER_PAGE: u32 = PAGE / UNIT;

/// Largest cell: room for a name of 255 bytes.
const MOST_UNITS: u32 = 19;

/// How many cells are looked at, at most, per allocation.
const LOOKS: u32 = 8;

/// Which cells this engine knows to be free.
#[derive(Default)]
pub(super) struct Cells {
    free: Vec<Vec<u32>>,
    /// Pages below were looked through, or were begun by this engine.
    scanned: u32,
    scan_end: u32,
    scan_unit: u32,
}

/// Number of units that `words` words need; none: no cell is that large.
fn units(words: u32) -> Option<u32> {
    Some(words.div_ceil(UNIT)).filter(|units| (1..=MOST_UNITS).contains(units))
}

/// First word of a cell; none for a number outside the table.
pub(super) fn word_of(geometry: &Geometry, cell: u32) -> Option<u32> {
    // Page 0 does not exist, so that no cell has number 0.
    let pages = 1..=geometry.page_capacity;
    pages.contains(&(cell / UNITS_PER_PAGE)).then(|| geometry.pages + (cell - UNITS_PER_PAGE) * UNIT)
}

impl Cells {
    /// Knows of no free cell yet; pages below `pages_high` may have some.
    pub(super) fn attach(pages_high: u32) -> Self {
        Cells { free: vec![Vec::new(); MOST_UNITS as usize + 1], scanned: 1, scan_end: pages_high, scan_unit: 0 }
    }

    /// A free cell of at least `words` words. It is taken only once its first word has been set.
    pub(super) fn take(&mut self, change: &mut Change<'_>, geometry: &Geometry, words: u32) -> Option<u32> {
        let units = units(words)?;
        self.look_around(change, geometry);
        match self.free.get_mut(units as usize)?.pop() {
            Some(cell) => Some(cell),
            None => self.begin_page(change, geometry, units),
        }
    }

    /// To be called when a cell's first word has been set to zero for good.
    pub(super) fn give_back(&mut self, cell: u32, words: u32) {
        let (page, unit) = (cell / UNITS_PER_PAGE, cell % UNITS_PER_PAGE);
        // One that is yet to be looked at will be found then.
        let seen = page >= self.scan_end || (page, unit) < (self.scanned, self.scan_unit);
        if let Some(free) = units(words).and_then(|units| self.free.get_mut(units as usize)).filter(|_| seen) {
            free.push(cell);
        }
    }

    fn begin_page(&mut self, change: &mut Change<'_>, geometry: &Geometry, units: u32) -> Option<u32> {
        let page = change.get(header::PAGES_HIGH) as u32;
        if page > geometry.page_capacity {
            return None;
        }
        change.set(header::PAGES_HIGH, u64::from(page) + 1);
        change.set(geometry.page_classes + page - 1, u64::from(units));
        let first = page * UNITS_PER_PAGE;
        let cells: Vec<u32> = (0..UNITS_PER_PAGE / units).map(|n| first + n * units).collect();
        for cell in &cells {
            if let Some(word) = word_of(geometry, *cell) {
                // What an earlier mount left there must not look like a name.
                if change.get(word) != 0 {
                    change.set(word, 0);
                }
            }
        }
        let free = self.free.get_mut(units as usize)?;
        free.extend(cells.into_iter().rev());
        free.pop()
    }

    /// Looks at the next few cells of the pages that earlier engines began.
    fn look_around(&mut self, change: &Change<'_>, geometry: &Geometry) {
        for _ in 0..LOOKS {
            if self.scanned >= self.scan_end {
                return;
            }
            let units = change.get(geometry.page_classes + self.scanned - 1) as u32;
            if !(1..=MOST_UNITS).contains(&units) || self.scan_unit + units > UNITS_PER_PAGE {
                (self.scanned, self.scan_unit) = (self.scanned + 1, 0);
                continue;
            }
            let cell = self.scanned * UNITS_PER_PAGE + self.scan_unit;
            self.scan_unit += units;
            // One that this very change gives back is not free before the change is made, and is told of then.
            if word_of(geometry, cell).is_some_and(|word| change.committed(word) == 0)
                && let Some(free) = self.free.get_mut(units as usize)
            {
                free.push(cell);
            }
        }
    }
}
