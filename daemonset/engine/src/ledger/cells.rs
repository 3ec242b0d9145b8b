//! Storage for names: pages of cells, all cells of a page of one size.
//!
//! A cell is free when its first word is zero. Nothing else records which cells are free: an engine starts with new pages
//! and finds the free cells of old ones by a scan, a page at a time. A page without names may get cells of another size,
//! and its memory is returned to the system.

use super::change::Change;
use super::layout::{Geometry, PAGE, header};
use super::words::Words;

/// Words of the smallest cell, and the step between sizes.
const UNIT: u32 = 2;

/// Cells are numbered by the unit at which they begin.
const UNITS_PER_PAGE: u32 = PAGE / UNIT;

/// Largest cell: room for a name of 255 bytes.
const MAX_UNITS: u32 = 19;

/// Empty pages that keep their memory for the next names.
const MAX_EMPTY: usize = 16;

/// By units of each cell: the units at which the cells of a page begin.
const BEGINS: [UnitSet; MAX_UNITS as usize + 1] = begins();

const fn begins() -> [UnitSet; MAX_UNITS as usize + 1] {
    let mut begins = [[0; UNITS_PER_PAGE as usize / 64]; MAX_UNITS as usize + 1];
    let mut units = 1;
    while units <= MAX_UNITS {
        let mut unit = 0;
        while unit + units <= UNITS_PER_PAGE {
            begins[units as usize][unit as usize / 64] |= 1 << (unit % 64);
            unit += units;
        }
        units += 1;
    }
    begins
}

/// Some of a page's units, a bit for each.
type UnitSet = [u64; UNITS_PER_PAGE as usize / 64];

/// What this engine knows about a page.
#[derive(Clone, Copy, Default)]
struct Page {
    /// Units of each cell; 0: not scanned, or damaged.
    units: u32,
    /// Which cells are used, by the unit at which they begin.
    used: UnitSet,
    /// True if it is in the list of its size.
    listed: bool,
    /// True if it is in the list of empty pages.
    listed_empty: bool,
}

impl Page {
    fn of(units: u32) -> Self {
        Page { units, ..Page::default() }
    }

    fn cells(self) -> impl Iterator<Item = u32> {
        (0..UNITS_PER_PAGE.checked_div(self.units).unwrap_or(0)).map(move |n| n * self.units)
    }

    fn is_used(&self, unit: u32) -> bool {
        self.used[unit as usize / 64] & (1 << (unit % 64)) != 0
    }

    fn is_empty(&self) -> bool {
        self.used.iter().all(|word| *word == 0)
    }

    fn free_cell(&self) -> Option<u32> {
        let begins = BEGINS.get(self.units as usize)?;
        let free = begins.iter().zip(&self.used).map(|(begins, used)| begins & !used);
        let (word, free) = (0u32..).zip(free).find(|(_, free)| *free != 0)?;
        Some(word * 64 + free.trailing_zeros())
    }

    fn set_used(&mut self, unit: u32, used: bool) {
        let (word, bit) = (&mut self.used[unit as usize / 64], 1 << (unit % 64));
        *word = if used { *word | bit } else { *word & !bit };
    }
}

/// The cells that this engine knows to be free.
#[derive(Default)]
pub(super) struct Cells {
    /// By number; page 0 does not exist.
    pages: Vec<Page>,
    /// By size: pages that have, or had, a free cell.
    with_room: Vec<Vec<u32>>,
    /// Pages that are, or were, empty.
    empty: Vec<u32>,
    /// Pages below this one have been scanned. Pages from `scan_end` on were begun by this engine.
    scanned: u32,
    scan_end: u32,
}

/// Units that `words` words need; none: no cell is that large.
fn units(words: u32) -> Option<u32> {
    Some(words.div_ceil(UNIT)).filter(|units| (1..=MAX_UNITS).contains(units))
}

/// First word of a cell; none: outside the table.
pub(super) fn word_of(geometry: &Geometry, cell: u32) -> Option<u32> {
    // Page 0 does not exist, so that no cell has number 0.
    let pages = 1..=geometry.page_capacity;
    pages.contains(&(cell / UNITS_PER_PAGE)).then(|| geometry.pages + (cell - UNITS_PER_PAGE) * UNIT)
}

impl Cells {
    /// Knows no free cell yet; pages below `pages_high` may have some.
    pub(super) fn attach(pages_high: u32) -> Self {
        let with_room = vec![Vec::new(); MAX_UNITS as usize + 1];
        Cells { with_room, scanned: 1, scan_end: pages_high, ..Cells::default() }
    }

    /// A free cell of at least `words` words. It is taken when this change sets its first word.
    pub(super) fn take(&mut self, change: &mut Change<'_>, geometry: &Geometry, words: u32) -> Option<u32> {
        let units = units(words)?;
        let page = self.page_with_room(change, geometry, units)?;
        let known = self.pages.get_mut(page as usize)?;
        if known.units != units && known.is_empty() {
            *known = Page { listed_empty: known.listed_empty, ..Page::of(units) };
            if u64::from(page) < change.get(header::PAGES_HIGH) {
                // At once: the bytes of names are written ahead of the change, and must not be where a cell of the former
                // size begins.
                let mut before = change.another();
                begin_page(&mut before, geometry, page, units);
                before.commit();
            } else {
                begin_page(change, geometry, page, units);
            }
            self.list(page);
        }
        let known = self.pages.get_mut(page as usize)?;
        let unit = known.free_cell()?;
        known.set_used(unit, true);
        Some(page * UNITS_PER_PAGE + unit)
    }

    /// True if there is a free cell of at least `words` words.
    pub(super) fn has_room(&mut self, change: &Change<'_>, geometry: &Geometry, words: u32) -> bool {
        units(words).is_some_and(|units| self.page_with_room(change, geometry, units).is_some())
    }

    /// Call this when the first word of the cell has been set to zero and the change has been made.
    pub(super) fn release(&mut self, words: &Words, geometry: &Geometry, cell: u32) {
        let (number, unit) = (cell / UNITS_PER_PAGE, cell % UNITS_PER_PAGE);
        // A cell of a page that has not been scanned will be found by the scan.
        let seen = number >= self.scan_end || number < self.scanned;
        let Some(page) = self.pages.get_mut(number as usize).filter(|page| seen && page.is_used(unit)) else { return };
        page.set_used(unit, false);
        let emptied = page.is_empty();
        self.list(number);
        if emptied && self.empty.len() > MAX_EMPTY {
            words.release(geometry.pages + (number - 1) * PAGE, PAGE);
        }
    }

    /// A page that has a free cell of this size, or can get cells of this size; if there is none left, one with a larger
    /// cell.
    fn page_with_room(&mut self, change: &Change<'_>, geometry: &Geometry, units: u32) -> Option<u32> {
        self.scan_page(change, geometry);
        loop {
            let known = self.known_page_with_room(units).or_else(|| self.empty_page());
            if known.is_some() {
                return known;
            }
            let high = change.get(header::PAGES_HIGH) as u32;
            if high <= geometry.page_capacity {
                self.pages.resize(self.pages.len().max(high as usize + 1), Page::default());
                return Some(high);
            }
            if self.scanned >= self.scan_end {
                return (units + 1..=MAX_UNITS).find_map(|larger| self.known_page_with_room(larger));
            }
            self.scan_page(change, geometry);
        }
    }

    fn known_page_with_room(&mut self, units: u32) -> Option<u32> {
        let list = self.with_room.get_mut(units as usize)?;
        while let Some(number) = list.last() {
            let page = self.pages.get_mut(*number as usize)?;
            if page.units == units && page.free_cell().is_some() {
                return Some(*number);
            }
            // Full, or of another size now.
            page.listed &= page.units != units;
            list.pop();
        }
        None
    }

    fn empty_page(&mut self) -> Option<u32> {
        while let Some(number) = self.empty.last() {
            let page = self.pages.get_mut(*number as usize)?;
            if page.is_empty() {
                return Some(*number);
            }
            page.listed_empty = false;
            self.empty.pop();
        }
        None
    }

    /// Adds a page to the lists that it belongs to.
    fn list(&mut self, number: u32) {
        let Some(page) = self.pages.get_mut(number as usize) else { return };
        if page.is_empty() && !std::mem::replace(&mut page.listed_empty, true) {
            self.empty.push(number);
        }
        if !std::mem::replace(&mut page.listed, true)
            && let Some(list) = self.with_room.get_mut(page.units as usize)
        {
            list.push(number);
        }
    }

    /// Scans the next of the pages that earlier engines began.
    fn scan_page(&mut self, change: &Change<'_>, geometry: &Geometry) {
        if self.scanned >= self.scan_end {
            return;
        }
        let number = self.scanned;
        self.scanned += 1;
        let units = change.committed(geometry.page_classes + number - 1) as u32;
        if !(1..=MAX_UNITS).contains(&units) {
            return;
        }
        let mut page = Page::of(units);
        for unit in page.cells() {
            // A cell that this change frees is not free before the change is made; it is released then.
            let word = word_of(geometry, number * UNITS_PER_PAGE + unit);
            page.set_used(unit, word.is_none_or(|word| change.committed(word) != 0));
        }
        self.pages.resize(self.pages.len().max(number as usize + 1), Page::default());
        if let Some(known) = self.pages.get_mut(number as usize) {
            *known = page;
        }
        self.list(number);
    }
}

/// Makes the page one of free cells of this size.
fn begin_page(change: &mut Change<'_>, geometry: &Geometry, number: u32, units: u32) {
    if change.get(header::PAGES_HIGH) <= u64::from(number) {
        change.set(header::PAGES_HIGH, u64::from(number) + 1);
    }
    change.set(geometry.page_classes + number - 1, u64::from(units));
    for unit in Page::of(units).cells() {
        if let Some(word) = word_of(geometry, number * UNITS_PER_PAGE + unit) {
            // Its previous content must not look like a name.
            if change.get(word) != 0 {
                change.set(word, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_divided_into_cells_of_its_size() {
        for units in 1..=MAX_UNITS {
            let cells: Vec<u32> = Page::of(units).cells().collect();
            assert_eq!(cells.len(), (UNITS_PER_PAGE / units) as usize);
            assert!(cells.iter().all(|cell| cell % units == 0 && cell + units <= UNITS_PER_PAGE));
        }
        assert_eq!(Page::default().free_cell(), None, "a page that was not scanned has no cells");
    }

    #[test]
    fn a_released_cell_is_free_again() {
        for units in 1..=MAX_UNITS {
            let mut page = Page::of(units);
            for unit in page.cells() {
                assert_eq!(page.free_cell(), Some(unit));
                page.set_used(unit, true);
            }
            assert_eq!(page.free_cell(), None, "cells of {units} units");
            page.set_used(2 * units, false);
            assert_eq!(page.free_cell(), Some(2 * units));
        }
    }
}
